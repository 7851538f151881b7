"""Options that a backend, a system or greedy decoding cannot honor are errors, never dropped."""

from __future__ import annotations

from recllm.builders.options import ItemOptions, ModelOptions, UserOptions
from recllm.config import refuse_given
from recllm.errors import DataError

_TRANSFORMERS = ("device_map", "attn_implementation", "quantization", "batch_tokens")
_LOCAL = ("adapter", "dtype", "min_pixels")
_SERVER = ("base_url", "api_key_env", "concurrency")
_OF_ONE_SYSTEM = {
    "with_title": "vlm4rec",
    "dataset_name": "mllmrec",
    "max_prompt_tokens": "mllmrec",
    "leak_all_interactions": "mllmrec",
    "sample_history": "mllmrec",
    "history_order": "mllmrec",
    "parts": "mllm_srec",
    "window": "mllm_srec",
    "step": "mllm_srec",
}


def check_used(options: ModelOptions) -> None:
    """Checks that every option that was given will have an effect.

    Raises:
        DataError: One would have none; it is named, with what to do.
    """
    batch = () if options.dry_run else ("batch_size",)  # a dry run asks for as many, whatever the backend
    if options.backend == "server":
        refuse_given(
            options,
            (*_LOCAL, *_TRANSFORMERS, *batch, "tensor_parallel_size"),
            "with --backend server: the server's own start decides it. Leave it out, or give --backend "
            "transformers or vllm",
        )
    elif options.backend == "vllm":
        refuse_given(
            options,
            (*_TRANSFORMERS, *batch, *_SERVER),
            "with --backend vllm. Leave it out, or give the backend that has it: transformers (weights and "
            "batches) or server (address, key, concurrency)",
        )
    else:
        refuse_given(
            options,
            ("tensor_parallel_size", *_SERVER),
            "with --backend transformers. Leave it out, or give --backend vllm (several GPUs; here it is "
            "--device-map auto) or server (address, key, concurrency)",
        )
    if options.temperature == 0:
        refuse_given(
            options,
            ("top_p", "seed"),
            "with greedy decoding. Leave it out, or give --temperature above 0",
        )
    if not options.dry_run:
        refuse_given(
            options,
            ("price_in", "price_out"),
            "on what is written: it is for the estimate of --dry-run. Leave it out, or add --dry-run",
        )
    elif (options.price_in is None) != (options.price_out is None):
        raise DataError("--price-in and --price-out: the estimate needs both of them")
    if isinstance(options, ItemOptions | UserOptions):
        fields = set(vars(options))
        others = [
            name for name, system in _OF_ONE_SYSTEM.items() if name in fields and system != options.system
        ]
        refuse_given(
            options, others, f"with --system {options.system}. Leave it out, or give the --system that has it"
        )

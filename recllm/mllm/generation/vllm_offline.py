"""The vLLM backend: the engine runs in this process, prompts and images are prepared one chunk ahead."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from recllm.errors import DataError
from recllm.files import read_json
from recllm.mllm.chat import Decoding, Request, Result
from recllm.mllm.checkpoints import check_architecture, check_model_folder, find_checkpoint
from recllm.mllm.fingerprint import fingerprint
from recllm.mllm.generation.server_format import request_seed
from recllm.mllm.loading import LoadedModel, checkpoint_identity, pixel_budget, read_processor
from recllm.mllm.rendering import count_tokens, expand, render
from recllm.mllm.vision.images import ImageError, image_size
from recllm.processes import world_size

if TYPE_CHECKING:
    from PIL import Image

LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""What vLLM takes as `max_lora_rank`."""


@dataclass(frozen=True)
class VllmOptions:
    """Which model vLLM runs, and how much of the accelerator it takes."""

    model: str = "tiny"
    """A local folder, a hub id such as Qwen/Qwen2-VL-2B-Instruct, or `tiny`, the embedded model."""
    adapter: str | None = None
    """A LoRA adapter trained on that model: a local folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; `auto` is vLLM's choice, which is 16 bits for weights saved in 32."""
    min_pixels: int | None = None
    """Smaller images are enlarged to this many pixels; by default the model's own setting."""
    max_pixels: int | None = None
    """Larger images are reduced to this many pixels; by default 200,704 (256 tokens of Qwen2-VL), or less."""
    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens; lower it where the cache does not fit the memory."""
    gpu_memory_utilization: float = 0.9
    """Share of the accelerator's memory that vLLM takes."""
    tensor_parallel_size: int = 1
    """Accelerators that one model is spread over."""
    chunk: int = 256
    """The most requests, and the most images, that are held decoded at once (twice: one chunk is ahead)."""

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise DataError(f"chunk {self.chunk}: expected 1 or more")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise DataError(
                f"gpu_memory_utilization {self.gpu_memory_utilization}: expected above 0, at most 1"
            )


@dataclass(frozen=True, slots=True)
class _Prompt:
    key: bytes
    text: str
    images: list[Image.Image]


class VllmBackend:
    """A `recllm.mllm.chat.Backend` over `vllm.LLM`.

    Prompts are rendered, guarded and counted as for the in-process backend, and images decoded to the size
    that the processor keeps; vLLM gets text and pixels. Its sampling parameters are given in full, so that of
    the model's generation_config.json only the tokens that end an answer count. Batches change the order of
    sums in vLLM's kernels: an answer can, rarely, depend on what else is in the batch.

    The engine wants to know beforehand how many images a prompt may have, which the data alone can tell. So
    it is made at the first `generate`, for the most images of a request there, rounded up to a power of two,
    and made anew when later requests have more: few times, even where windows of requests grow. Ours.

    Attributes:
        identity: As `recllm.mllm.loading.LoadedModel`'s, with backend `vllm` and the dtype as asked for.
        special_tokens: What `safe_text` should know of.
    """

    def __init__(self, options: VllmOptions) -> None:
        """Checks that vLLM is there and the model is whole; loads no weights yet.

        Raises:
            DataError: vLLM is not installed, the model or adapter is not usable, or a launcher has started
                several processes.
        """
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except (ImportError, OSError) as error:  # OSError: built for another driver or torch
            raise DataError(
                f"vLLM cannot be imported ({error}): install it (`pip install vllm`, on a machine with an "
                "accelerator), or use the in-process backend or a server"
            ) from None
        if world_size() > 1:
            raise DataError(
                "the vLLM backend spreads a model over accelerators itself: start one process, with "
                "tensor_parallel_size, and not `accelerate launch`"
            )
        found = find_checkpoint(options.model, options.revision)
        check_architecture(check_model_folder(found.folder), found.folder)
        self._vllm = vllm
        self._lora = None
        self._lora_settings: dict[str, Any] = {}
        adapter = None
        if options.adapter is not None:
            from recllm.mllm.adapters import check_adapter_folder

            lora = find_checkpoint(options.adapter)
            check_adapter_folder(lora.folder, found)
            adapter = fingerprint(lora.folder)
            self._lora = LoRARequest("adapter", 1, str(lora.folder))
            rank = _adapter_rank(lora.folder)
            self._lora_settings = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        self.options = options
        self._folder = found.folder
        processor = read_processor(found.folder, options.min_pixels, options.max_pixels)
        self.identity: dict[str, Any] = {
            "backend": "vllm",
            **checkpoint_identity(found),
            "adapter": adapter,
            "dtype": options.dtype,
            "quantization": None,
            **pixel_budget(processor),
        }
        self._loaded = LoadedModel(None, processor, self.identity)
        self.special_tokens = self._loaded.special_tokens
        self._engine: Any = None
        self._engine_images = 0

    def show(self, request: Request) -> str:
        """Returns a prompt as the chat template writes it, one placeholder an image."""
        return render(self._loaded, request)

    def count_tokens(self, request: Request) -> int:
        """Returns a prompt's exact length in tokens; of images only the headers are read.

        Raises:
            DataError: See `recllm.mllm.rendering.render`; ImageError where an image's header cannot be read.
        """
        return self._render(request)[1]

    def _render(self, request: Request) -> tuple[str, int]:
        sizes = [image_size(path) for path in request.images]
        text = render(self._loaded, request)
        return text, count_tokens(self._loaded, expand(self._loaded, text, sizes))

    def generate(
        self, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> Iterator[list[Result]]:
        """Answers (key, request) pairs; yields the results of a chunk as it is done.

        An unreadable image or a prompt longer than the model's context is a result with an error; the other
        requests go on.

        Raises:
            DataError: A text forges special tokens (see `recllm.mllm.rendering.render`), or vLLM cannot
                start.
        """
        if not requests:
            return
        self._make_engine(max(len(request.images) for _, request in requests))
        chunks = _chunks(requests, self.options.chunk)
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(4) as decoders:
            upcoming = ahead.submit(self._prepare, next(chunks), decoding, decoders)
            while upcoming is not None:
                prompts, results = upcoming.result()
                following = next(chunks, None)
                upcoming = following and ahead.submit(self._prepare, following, decoding, decoders)
                yield results + self._answer(prompts, decoding)

    def close(self) -> None:
        """Ends the engine and frees its memory; the next `generate` starts it again."""
        if self._engine is None:
            return
        self._engine.llm_engine.engine_core.shutdown()
        self._engine = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _make_engine(self, most_images: int) -> None:
        if self._engine is not None and most_images <= self._engine_images:
            return
        self.close()
        options = self.options
        images = 1 << max(0, most_images - 1).bit_length()
        budget = pixel_budget(self._loaded.processor)
        settings: dict[str, Any] = {
            "dtype": options.dtype,
            "seed": 0,
            "trust_remote_code": False,
            "load_format": "safetensors",
            "tensor_parallel_size": options.tensor_parallel_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "limit_mm_per_prompt": {"image": images, "video": 0},
            "mm_processor_kwargs": {name: pixels for name, pixels in budget.items() if pixels is not None},
            "enable_prefix_caching": True,
            **self._lora_settings,
        }
        if options.max_model_len is not None:
            settings["max_model_len"] = options.max_model_len
        try:
            # The folder of the checked files, also for a hub id: they are what `identity` names.
            self._engine = self._vllm.LLM(model=str(self._folder), **settings)
        except (ValueError, RuntimeError) as error:
            raise DataError(
                f"vLLM cannot start on {options.model}: {str(error).strip() or type(error).__name__}"
            ) from error
        self._engine_images = images

    def _prepare(
        self, chunk: Sequence[tuple[bytes, Request]], decoding: Decoding, decoders: ThreadPoolExecutor
    ) -> tuple[list[_Prompt], list[Result]]:
        load = self._loaded.images.load
        limit = self._engine.llm_engine.model_config.max_model_len
        prompts, failed = [], []
        for key, request in chunk:
            try:
                text, tokens = self._render(request)
                if tokens + decoding.max_new_tokens > limit:
                    excess = (
                        f"budget: request {request.id!r} has {tokens} tokens, and "
                        f"{decoding.max_new_tokens} for its answer, but the model takes {limit}"
                    )
                    failed.append(Result.failed(key, excess))
                    continue
                images = list(decoders.map(load, request.images))
            except ImageError as error:
                failed.append(Result.failed(key, f"image: {error}"))
                continue
            prompts.append(_Prompt(key, self._without_bos(text), images))
        return prompts, failed

    def _without_bos(self, text: str) -> str:
        """Returns a prompt without the token that vLLM, which tokenizes it, puts before it once more."""
        tokenizer = self._loaded.tokenizer
        bos = tokenizer.bos_token
        if bos and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
            return text.removeprefix(bos)
        return text

    def _answer(self, prompts: list[_Prompt], decoding: Decoding) -> list[Result]:
        if not prompts:
            return []
        outputs = self._engine.generate(
            [
                {"prompt": prompt.text, "multi_modal_data": {"image": prompt.images}}
                if prompt.images
                else {"prompt": prompt.text}
                for prompt in prompts
            ],
            [self._sampling(prompt.key, decoding) for prompt in prompts],
            use_tqdm=False,
            lora_request=self._lora,
        )
        return [_result(prompt.key, output) for prompt, output in zip(prompts, outputs, strict=True)]

    def _sampling(self, key: bytes, decoding: Decoding) -> Any:
        sampled = {"top_p": decoding.top_p, "seed": request_seed(decoding.seed, key)}
        return self._vllm.SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            **(sampled if decoding.temperature > 0 else {}),
        )


def _chunks(
    requests: Sequence[tuple[bytes, Request]], most: int
) -> Iterator[Sequence[tuple[bytes, Request]]]:
    start, images = 0, 0
    for place, (_, request) in enumerate(requests):
        images += len(request.images)
        if place > start and (place - start >= most or images > most):
            yield requests[start:place]
            start, images = place, len(request.images)
    yield requests[start:]


def _adapter_rank(folder: Any) -> int:
    config = read_json(folder / "adapter_config.json", "an adapter's folder")
    rank = max([config.get("r", 0), *config.get("rank_pattern", {}).values()])
    if rank > LORA_RANKS[-1]:
        raise DataError(f"{folder}: LoRA rank {rank}; vLLM takes at most {LORA_RANKS[-1]}")
    return next(room for room in LORA_RANKS if room >= rank)


def _result(key: bytes, output: Any) -> Result:
    answer = output.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        return Result.failed(key, f"server: vLLM ended the request with {answer.finish_reason!r}")
    return Result(key, answer.text, len(output.prompt_token_ids), len(answer.token_ids), answer.finish_reason)

"""What training needs to know of how it was launched: processes, DDP, ZeRO-2, ZeRO-3, GPU or CPU.

`accelerate launch` tells its processes about itself through the environment. On GPUs the trainer understands
all of it. Here are the few things that it does not see: several processes on CPUs, ZeRO-3 before the model is
loaded, and launches that cannot mean what they say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from recllm.errors import DataError
from recllm.precision import has_bfloat16
from recllm.processes import local_rank, world_size

if TYPE_CHECKING:
    from recllm.training.options import SFTOptions

_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_plugins: list[Any] = []  # transformers holds the ZeRO-3 configuration by a weak reference only


def zero_stage() -> int:
    """Returns the stage of DeepSpeed's ZeRO that this process was launched with; 0 without DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return 0
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def prepare(options: SFTOptions) -> dict[str, Any]:
    """Checks the launch, and has the model that is loaded next fit it; to be called before it is loaded.

    Under ZeRO-3 the weights are shared out as they are read, so that no process ever holds them all. Not so
    those in 4 bits, and those that an adapter is put on, whose effect is checked first: each process reads
    them all, and the trainer shares them out.

    Args:
        options: What is to train.

    Returns:
        Arguments for transformers' `TrainingArguments` (or TRL's `SFTConfig`), which is to be made *after*
        the model was loaded: `use_cpu`, `ddp_backend`, `ddp_find_unused_parameters`.

    Raises:
        DataError: The launch started fewer processes than it says, more than there are GPUs, or wants
            bfloat16 of DeepSpeed on CPUs.
    """
    import torch

    _check_processes()
    arguments: dict[str, Any] = {"ddp_find_unused_parameters": False}
    if not torch.cuda.is_available():
        arguments |= _on_cpu(options)
    if zero_stage() == 3 and options.method != "qlora" and options.adapter is None:
        _share_out_while_loading(uses_bf16(options))
    return arguments


def uses_bf16(options: SFTOptions) -> bool:
    """Returns whether to train in mixed precision with bfloat16: as asked, by default where a GPU has it.

    Raises:
        DataError: It was asked for, and neither the GPU nor the CPU has it.
    """
    import torch

    if options.bf16 == "auto":
        return torch.cuda.is_available() and has_bfloat16()
    if options.bf16 == "yes" and not has_bfloat16():
        raise DataError("--bf16 yes: this machine has no instructions for bfloat16; leave it out")
    return options.bf16 == "yes"


def keep_used_renamings(model: Any) -> None:
    """Makes a model that was loaded under ZeRO-3 save its weights under the names that it was loaded by.

    transformers undoes, on saving, the renamings of loading; under ZeRO-3 it also undoes those that no weight
    needed, and a file with names like `model.model.layers` results.

    Args:
        model: The transformers model, just loaded.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if zero_stage() == 3 and conversions:
        model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


@contextmanager
def whole(weights: Iterable[Any]) -> Iterator[None]:
    """Makes weights whole inside the block that ZeRO-3 has shared out among the processes.

    For weights that are read as they stand; inside a module's `forward` DeepSpeed does it. All processes have
    to come here. Without ZeRO-3 nothing happens.

    Args:
        weights: The parameters that are read.
    """
    shared = [weight for weight in weights if hasattr(weight, "ds_id")]
    if shared:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(shared, modifier_rank=None)
    else:
        context = nullcontext()
    with context:
        yield


def _check_processes() -> None:
    import torch

    environment = os.environ
    several = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment
    if several and "WORLD_SIZE" not in environment and not any(name in environment for name in _MPI):
        raise DataError(
            "accelerate launch was asked for several processes but started one, as it does with --cpu and "
            "with distributed_type MULTI_CPU; use --config_file recipes/launch/cpu2.yaml"
        )
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and (here > torch.cuda.device_count() or local_rank() >= here):
        raise DataError(
            f"{here} processes were launched on this machine, which has {torch.cuda.device_count()} GPUs; "
            "say --num_processes (of all machines together), or put the number into the launch file"
        )


def _on_cpu(options: SFTOptions) -> dict[str, Any]:
    if zero_stage() == 0:
        return {"use_cpu": True}  # without it, several processes train several models, each for itself
    if uses_bf16(options):
        raise DataError("--bf16 yes: DeepSpeed computes in bfloat16 on GPUs only; leave it out here")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    # Its shared-memory reduction is compiled on first use, which needs a compiler and most of a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {"ddp_backend": "gloo"} if world_size() > 1 or "LOCAL_RANK" in os.environ else {}


def _share_out_while_loading(bf16: bool) -> None:
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision("bf16" if bf16 else "no")
    plugin.set_deepspeed_weakref()
    _plugins.append(plugin)

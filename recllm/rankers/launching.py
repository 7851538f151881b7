"""Launches that rankers cannot be trained under, refused before any work starts.

Rankers are small: they train in float32, each process with the whole model. Their losses are float32
functions of their own, Adam is not wrapped, and each batch is one step.
"""

from __future__ import annotations

import os
from typing import Any

from recllm.errors import DataError

_INSTEAD = "take single_gpu.yaml, ddp.yaml, cpu.yaml or cpu2.yaml of recipes/launch"
_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (zero2.yaml, zero3.yaml)",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def check_launch() -> None:
    """Checks what `accelerate launch` told this process.

    Raises:
        DataError: It asks for sharded training, mixed precision, or steps of several batches.
    """
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on"):
            raise DataError(
                f"rankers are not trained with {name}: each process holds the whole model; {_INSTEAD}"
            )
    check_precision(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise DataError(
            f"rankers take a step with each batch, and accelerate was launched with {steps} gradient "
            "accumulation steps; leave it at 1 and give a larger --batch-size"
        )


def check_precision(mixed_precision: Any) -> None:
    """Raises a `DataError` for any mixed precision (bf16, fp16, fp8)."""
    if str(mixed_precision).lower() != "no":
        raise DataError(
            "rankers are trained in float32, and accelerate was launched with mixed precision "
            f"{mixed_precision}; leave it at 'no' (--mixed_precision no), or {_INSTEAD}"
        )

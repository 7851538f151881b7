"""Half precision only where the hardware computes in it: the one place that decides."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def cpu_has_bfloat16() -> bool:
    """Returns whether this CPU multiplies matrices in bfloat16 by instructions of its own.

    Without them (AVX2 alone, or the first AVX-512 CPUs) a bfloat16 product takes many times as long as one in
    float32. `ONEDNN_MAX_CPU_ISA` and `ATEN_CPU_CAPABILITY` count, so that a CPU can stand for a lesser one.
    """
    import torch

    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or not supported():
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith(("AVX", "DEFAULT")):  # x86: oneDNN also says yes where AVX-512 emulates bfloat16
        return capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return True


def has_bfloat16() -> bool:
    """Returns whether this process's accelerator, or the CPU without one, computes in bfloat16."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_bfloat16()


def computed_in(dtype: torch.dtype, *, on_cpu: bool) -> torch.dtype:
    """Returns the number type to compute in: `dtype`, but float32 where a CPU would emulate half precision.

    Args:
        dtype: The number type of the weights on disk.
        on_cpu: Whether the CPU computes.
    """
    import torch

    emulated = dtype == torch.float16 or (dtype == torch.bfloat16 and not cpu_has_bfloat16())
    return torch.float32 if on_cpu and emulated else dtype


def warn_if_emulated(dtype: torch.dtype, *, on_cpu: bool) -> None:
    """Writes a line to standard error if a CPU was asked to compute in a number type that it emulates."""
    if computed_in(dtype, on_cpu=on_cpu) != dtype:
        name = str(dtype).removeprefix("torch.")
        print(
            f"note: this CPU has no instructions for {name} and will be much slower in it than in float32 "
            "(--dtype auto or float32)",
            file=sys.stderr,
            flush=True,
        )


def vector_instructions() -> str:
    """Returns the widest vector instructions that torch uses on this CPU: `AVX2`, `AVX512, bf16`, ..."""
    import torch

    name = torch.backends.cpu.get_cpu_capability()
    return f"{name}, bf16" if cpu_has_bfloat16() else name

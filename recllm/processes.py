"""This process among those of `accelerate launch`: its rank, their number, and waiting for the others."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

from recllm.errors import DataError

_PATIENCE = timedelta(days=30)  # one rank may have days of work more than another
_POLL_SECONDS = 0.05


def rank() -> int:
    """Returns the number of this process among all, from 0; 0 without a launcher."""
    return _number("RANK", 0)


def world_size() -> int:
    """Returns the number of processes; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Returns the number of this process on its machine, which is that of its device."""
    return _number("LOCAL_RANK", 0)


def connect() -> None:
    """Connects to the other ranks, so that the end of one is noticed by those that wait for it later.

    Waits until all have come here. Does nothing where there is one process.
    """
    if world_size() > 1:
        _group()


def sum_over_ranks(numbers: Sequence[int]) -> list[int]:
    """Waits until every rank has come here, and returns the sums of what they brought.

    Runs beside whatever torch.distributed or accelerate have set up, on any device: the ranks talk through a
    group of their own, over TCP, set up from the launcher's environment.

    Raises:
        RuntimeError: Another rank has ended.
    """
    if world_size() == 1:
        return list(numbers)
    import torch

    sums = torch.tensor(list(numbers), dtype=torch.int64)
    _reduce(sums)
    return sums.tolist()


def _reduce(sums: Any) -> None:
    """Adds the other ranks' numbers to a tensor."""
    try:
        work = _group().allreduce([sums])
        while not work.is_completed():  # a wait inside torch would not hear Ctrl-C
            time.sleep(_POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {rank()} of {world_size()}: another rank has ended before its work was done; its own "
            "message says why. What was generated is kept: run the same command again."
        ) from error


def sum_bytes_over_ranks(own: bytearray) -> bytearray:
    """Does what `sum_over_ranks` does for bytes of equal number, of which only one rank's is not zero."""
    if world_size() == 1:
        return own
    import torch

    sums = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else torch.empty(0, dtype=torch.uint8)
    if len(sums):
        _reduce(sums)
    return bytearray(sums.numpy().tobytes())


@cache
def _group() -> Any:
    import torch.distributed as distributed

    store, number, count = next(distributed.rendezvous("env://", timeout=_PATIENCE))
    store = distributed.PrefixStore("recllm", store)
    return distributed.ProcessGroupGloo(store, number, count, _PATIENCE)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise DataError(f"the environment variable {variable} is {text!r}; a launcher sets it to a number")
    return int(text)

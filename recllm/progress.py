"""Progress of long work: a bar on a terminal, a line every 30 seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

INTERVAL = 30.0
"""Seconds between two lines."""


class Progress(tqdm):
    """tqdm's bar if standard error is a terminal; else a line every 30 seconds on standard error.

    A line has what is done, of how many, the rate and the time left; work that ends sooner prints none.
    A thread prints it, so that one long batch does not look like a halt.

    Args:
        iterable: As for tqdm.
        desc: What is done, for example `tokens`.
        total: How many there are; None if it is not known.
        unit: What is counted, in the singular; `B` for bytes.
        initial: How many were done before.
        disable: True shows nothing, as on ranks other than 0.
        named: Anything else that tqdm takes; it concerns the bar alone.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: float | None = None,
        *,
        unit: str = "it",
        initial: int = 0,
        disable: bool = False,
        **named: Any,
    ) -> None:
        self._lines = not disable and not sys.stderr.isatty()
        super().__init__(
            iterable, desc, total, unit=unit, initial=initial, disable=disable or self._lines, **named
        )
        if self._lines:
            self.n, self._first = initial, initial
            self._name, self._unit, self._printed = desc or "progress", unit, False
            self._began = time.monotonic()
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._thread.start()

    def update(self, n: float | None = 1) -> bool | None:
        """Counts `n` more."""
        if self._lines:
            self.n += n or 0
            return None
        return super().update(n)

    def __iter__(self) -> Iterator[Any]:
        if not self._lines:
            yield from super().__iter__()
            return
        with self:
            for each in self.iterable:
                yield each
                self.n += 1

    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        """Renames the work."""
        if self._lines:
            self._name = desc or self._name
        else:
            super().set_description(desc, refresh)

    def close(self) -> None:
        """Ends the bar, or prints the last line if there were others."""
        if not self._lines:
            super().close()
            return
        self._ended.set()
        self._thread.join()
        if self._printed:
            self._printed = False
            print(
                f"{self._name}: {self._counted(self.n)} in {_duration(time.monotonic() - self._began)}",
                file=sys.stderr,
                flush=True,
            )

    def _tick(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._printed = True
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        elapsed = time.monotonic() - self._began
        rate = (self.n - self._first) / elapsed
        done = self._counted(self.n)
        if self.total:
            done = f"{self._counted(self.n, '')} of {self._counted(self.total)}"
        parts = [done, f"{_duration(elapsed)} so far"]
        if rate:
            parts.append(self._rate(rate))
            if self.total and self.total > self.n:
                parts.append(f"about {_duration((self.total - self.n) / rate)} left")
        return f"{self._name}: {', '.join(parts)}"

    def _rate(self, rate: float) -> str:
        if self._unit == "B":
            return f"{self._counted(rate)} a second"
        return f"{_number(rate)} a second" if rate >= 1 else f"{_number(1 / rate)} s each"

    def _counted(self, count: float, unit: str | None = None) -> str:
        if self._unit == "B":
            return f"{count / 1e6:,.1f} MB" if unit is None else f"{count / 1e6:,.1f}"
        plural = self._unit if count == 1 else f"{self._unit}s"
        return f"{count:,.0f} {plural}" if unit is None else f"{count:,.0f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"

"""Candidates for nearest neighbors from products in bfloat16, with an error bound: no neighbor is lost.

CPUs with bfloat16 instructions multiply it about three times as fast as float32. With unit vectors u, their
roundings l = bf16(u) and the error norms e = |u - l|, which are computed, the Cauchy-Schwarz inequality gives

    |u_a . u_b - bf16(l_a . l_b)| <= e_a + (1 + e_a) e_b + (d + 1) 2^-24 + 2^-8 = eps

(rounding of both vectors, float32 sums over d numbers, rounding of the result). At least k products of row a
are not below t, the k-th largest of the maxima over chunks of columns. So the k-th largest cosine is at least
t - eps, and whatever is among the k nearest has a product of at least t - 2 eps. Those pairs, a few dozen a
row, are computed again in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recllm.precision import cpu_has_bfloat16

CHUNK = 64
"""Columns that share a maximum."""
_LEAST_CHUNKS = 16  # for each neighbor: with fewer chunks, a plain top-k is as fast
_MOST = 256  # candidates a row, on average; with more, the plain way is faster
_COLUMNS = 8192  # of a product at a time: the result stays in the processor's cache


def can_screen(vectors: Tensor, k: int) -> bool:
    """Returns whether screening pays: a CPU that multiplies bfloat16, and many more items than neighbors."""
    many = len(vectors) >= CHUNK * _LEAST_CHUNKS * k
    return vectors.device.type == "cpu" and many and cpu_has_bfloat16()


class Screen:
    """Vectors in bfloat16 and the error of that.

    Args:
        vectors: None of them zero; float32, shape [items, width].
        scale: 1 over their lengths; shape [items].
    """

    def __init__(self, vectors: Tensor, scale: Tensor) -> None:
        self._vectors, self._scale = vectors, scale
        items, width = vectors.shape
        self._low = torch.empty(items, width, dtype=torch.bfloat16)
        self._errors = torch.empty(items)
        for at in range(0, items, _COLUMNS):
            part = slice(at, at + _COLUMNS)
            unit = vectors[part] * scale[part, None]
            self._low[part] = unit
            self._errors[part] = (unit - self._low[part].float()).norm(dim=1)
        self._largest_error = self._errors.max()
        self._rest = (width + 1) * 2**-24 + 2**-8
        self._buffer = self._low.new_empty(0)

    def nearest(self, rows: slice, k: int) -> tuple[Tensor, Tensor] | None:
        """Finds the k nearest of some rows, themselves first.

        Returns:
            Columns [rows, k] and cosines [rows, k], by falling cosine, then by column; None if there
            are fewer than k chunks of columns, if bfloat16 does not tell pairs apart, or if a row may have a
            neighbor with a cosine of 0 or less.
        """
        own = self._low[rows]
        count, items = len(own), len(self._low)
        chunks = -(-items // CHUNK)
        if chunks < k:
            return None
        if self._buffer.numel() < count * chunks * CHUNK:
            self._buffer = own.new_empty(count * chunks * CHUNK)
        similar = self._buffer[: count * chunks * CHUNK].view(count, chunks * CHUNK)
        similar[:, items:] = -torch.inf
        for at in range(0, items, _COLUMNS):
            block = self._low[at : at + _COLUMNS]
            torch.mm(own, block.T, out=similar[:, at : at + len(block)])
        similar = similar.view(count, chunks, CHUNK)
        # Above zero, bits are ordered as the numbers are, and integers have the faster maximum. Of a chunk
        # without a positive number this takes any of them, which is no neighbor where `least` is positive.
        largest = similar.view(torch.int16).amax(2).view(torch.bfloat16)
        error = self._errors[rows]
        error = error + (1 + error) * self._largest_error + self._rest
        least = largest.topk(k, dim=1).values[:, -1].float() - 2 * error
        if not (least > 0).all():
            return None
        row, chunk = (largest.float() >= least[:, None]).nonzero(as_tuple=True)
        inner = (similar[row, chunk].float() >= least[row, None]).nonzero(as_tuple=True)
        row, column = row[inner[0]], chunk[inner[0]] * CHUNK + inner[1]
        if len(row) > _MOST * count:
            return None
        return self._exact(rows, row, column, k)

    def _exact(self, rows: slice, row: Tensor, column: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Sorts the pairs of each row, which are ordered by row and column, by their cosines in float32."""
        product = (self._vectors[row + rows.start] * self._vectors[column]).sum(1)
        cosines = product * self._scale[column]
        first = torch.where(row + rows.start == column, torch.inf, cosines)
        order = first.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        starts = torch.searchsorted(row, torch.arange(rows.stop - rows.start))
        best = order[starts[:, None] + torch.arange(k)]
        return column[best], (cosines[best] * self._scale[rows, None]).clamp(-1, 1)

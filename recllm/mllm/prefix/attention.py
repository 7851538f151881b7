"""Attention over prompts that share a prefix: the prefix stands once, and each suffix sees it and itself.

In inference a suffix attends in two parts, to the prefix (all of it, so no mask) and to itself (causally);
the two are merged by their log-sum-exps, which is exact (as in "Hydragen", arXiv 2402.05099). No mask is
built, and no key of the prefix is copied. In training it attends to both at once, since PyTorch has no
gradient of a log-sum-exp: keys of the prefix are repeated for each suffix, which is little beside the linear
layers that are spared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch.nn import functional

NAME = "recllm_shared_prefix"
DEVICES = ("cpu", "cuda")
"""Where attention can give its log-sum-exp."""


@dataclass(frozen=True)
class Rows:
    """Suffixes of one group as rows, in blocks of similar length.

    Attributes:
        blocks: Of each block, the packed token at each place of its rows, counted from the first suffix;
            (suffixes, longest), 0 where there is none.
        places: Of each block, where its tokens are in the flattened rows.
        order: Where each packed token is in the blocks' tokens, one block after the other; None for as it is.
    """

    blocks: list[torch.Tensor]
    places: list[torch.Tensor]
    order: torch.Tensor | None

    def packed(self, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns what was found for each block, (suffixes, heads, longest, ...), as (heads, tokens, ...)."""
        parts = [
            rows.transpose(0, 1).flatten(1, 2)[:, places]
            for rows, places in zip(found, self.places, strict=True)
        ]
        return parts[0] if self.order is None else torch.cat(parts, 1)[:, self.order]


@dataclass(frozen=True)
class GroupLayout:
    """One group's place in a row of packed tokens: its prefix, then its suffixes, one after the other.

    Attributes:
        start: The first token of the prefix.
        prefix: Tokens of the prefix; may be 0.
        suffixes: Tokens of each suffix.
    """

    start: int
    prefix: int
    suffixes: tuple[int, ...]
    _on: dict[torch.device, Rows] = field(default_factory=dict, compare=False)

    @property
    def suffix_start(self) -> int:
        """The first token of the first suffix."""
        return self.start + self.prefix

    @cached_property
    def end(self) -> int:
        """One past the last token."""
        return self.suffix_start + sum(self.suffixes)

    def rows(self, device: torch.device) -> Rows:
        """Returns how suffixes are laid out as rows, padded on the right, and back; see `Rows`."""
        if device not in self._on:
            lengths = torch.tensor(self.suffixes)
            starts = lengths.cumsum(0) - lengths
            blocks, places, packed = [], [], []
            for members in _of_similar_length(self.suffixes):
                columns = torch.arange(int(lengths[members].max()))
                used = columns < lengths[members, None]
                tokens = torch.where(used, starts[members, None] + columns, 0)
                blocks.append(tokens.to(device))
                places.append(used.flatten().nonzero()[:, 0].to(device))
                packed.append(tokens[used])
            order = torch.cat(packed).argsort().to(device) if len(blocks) > 1 else None
            self._on[device] = Rows(blocks, places, order)
        return self._on[device]


def _of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Returns the numbers of the suffixes in blocks, in each of which padding is less than two thirds."""
    blocks: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not blocks or 3 * lengths[number] < lengths[blocks[-1][0]]:
            blocks.append([])
        blocks[-1].append(number)
    return [sorted(block) for block in blocks]


@contextmanager
def shared_prefix_attention(language_model: Any) -> Iterator[None]:
    """Switches a language model to `attend` meanwhile; its forward pass must be given `layout`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    config = language_model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    layout: Sequence[GroupLayout],
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attends within one row of packed groups; an attention function as transformers calls them.

    Args:
        module: The attention layer.
        query: (1, heads, tokens, width).
        key: (1, key-value heads, tokens, width).
        value: As `key`.
        attention_mask: None; the layout says it all.
        scaling: Of the scores.
        layout: The groups, one after the other.
        dropout: Of the weights, in training.

    Returns:
        (1, tokens, heads, width), and None for the weights.
    """
    query, key, value = query[0], key[0], value[0]
    if module.training:
        return _attend_in_training(query, key, value, layout, scaling, dropout)[None], None
    output = query.new_empty(query.shape[1], len(query), query.shape[2])
    for group in layout:
        prefix, own = slice(group.start, group.suffix_start), slice(group.suffix_start, group.end)
        alone, alone_lse = _among_themselves(query[:, own], key[:, own], value[:, own], group, scaling)
        if not group.prefix:
            output[own] = alone.transpose(0, 1)
            continue
        output[prefix] = _causal(query[:, prefix], key[:, prefix], value[:, prefix], scaling)
        before, before_lse = _all_of(query[:, own], key[:, prefix], value[:, prefix], scaling)
        share = torch.sigmoid(alone_lse - before_lse)[..., None]
        merged = torch.lerp(before.float(), alone.float(), share)
        output[own] = merged.to(output.dtype).transpose(0, 1)
    return output[None], None


def _attend_in_training(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Sequence[GroupLayout],
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Attention by operations that have gradients; (tokens, heads, width)."""
    attention = partial(functional.scaled_dot_product_attention, scale=scaling, dropout_p=dropout)
    repeats = len(query) // len(key)
    whole = query, key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    sizes = [size for group in layout for size in (group.prefix, sum(group.suffixes))]
    # Split once: the gradient of each slice by itself would be as large as all tokens.
    pieces = list(zip(*(part[None].split(sizes, 2) for part in whole), strict=True))
    outputs = []
    for group, prefix, own in zip(layout, pieces[::2], pieces[1::2], strict=True):
        if group.prefix:
            outputs.append(attention(*prefix, is_causal=True)[0])
        rows, found = group.rows(query.device), []
        for tokens in rows.blocks:
            count, longest = tokens.shape
            asking, *answering = (part[0][:, tokens].transpose(0, 1) for part in own)
            answering = [
                torch.cat([before.expand(count, -1, -1, -1), suffixes], 2)
                for before, suffixes in zip(prefix[1:], answering, strict=True)
            ]  # (suffixes, heads, prefix + longest, width)
            seen = torch.ones(longest, group.prefix + longest, dtype=torch.bool, device=query.device)
            found.append(attention(asking, *answering, attn_mask=seen.tril(group.prefix)))
        outputs.append(rows.packed(found))
    return torch.cat(outputs, 1).transpose(0, 1)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    repeats = len(query) // len(key)
    output = functional.scaled_dot_product_attention(
        query[None],
        key.repeat_interleave(repeats, 0)[None],
        value.repeat_interleave(repeats, 0)[None],
        is_causal=True,
        scale=scaling,
    )
    return output[0].transpose(0, 1)


def _among_themselves(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: GroupLayout, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each suffix's attention to itself; (heads, tokens, width) and its log-sum-exp, (heads, tokens)."""
    layout = group.rows(query.device)
    repeats = len(query) // len(key)
    whole = query, key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    outputs, lses = [], []
    for tokens in layout.blocks:
        rows = [part[:, tokens].transpose(0, 1) for part in whole]  # (suffixes, heads, longest, width)
        output, lse = _with_lse(*rows, scaling, causal=True)
        outputs.append(output)
        lses.append(lse)
    return layout.packed(outputs), layout.packed(lses)


def _all_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to every key. Without a mask, the query heads of one key-value head are one long row."""
    heads, tokens, width = query.shape
    folded = query.reshape(1, len(key), -1, width)
    output, lse = _with_lse(folded, key[None], value[None], scaling, causal=False)
    return output.reshape(heads, tokens, width), lse.reshape(heads, tokens)


def _with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of (rows, heads, queries, width), and the log-sum-exp of its scores in float32."""
    kernels = torch.ops.aten
    queries = query.shape[2]
    if query.device.type == "cpu":
        return kernels._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scaling
        )
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[3] % 8 == 0:
        found = kernels._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)
    else:
        found = kernels._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )
    return found[0], found[1][..., :queries]

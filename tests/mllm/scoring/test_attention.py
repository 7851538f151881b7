"""Attention in two parts against one softmax under a mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from recllm.mllm.prefix.attention import GroupLayout, attend

GROUPS = [(7, (1,)), (0, (5, 2, 9)), (40, (3, 11, 1, 3)), (1, (1, 1))]


def layout_of(groups) -> tuple[GroupLayout, ...]:
    layout, start = [], 0
    for prefix, suffixes in groups:
        layout.append(GroupLayout(start, prefix, suffixes))
        start = layout[-1].end
    return tuple(layout)


def mask_of(groups) -> torch.Tensor:
    """What may be seen: one's own past, within the prefix of one's group and within one's own suffix."""
    kinds = []
    for number, (prefix, suffixes) in enumerate(groups):
        kinds += [(number, -1)] * prefix
        kinds += list(itertools.chain.from_iterable([(number, at)] * n for at, n in enumerate(suffixes)))
    groups_of, parts = torch.tensor(kinds).T
    same_group = groups_of[:, None] == groups_of[None]
    seen = (parts[None] == -1) | (parts[:, None] == parts[None])
    return (same_group & seen).tril()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("training", [False, True])
def test_two_parts_are_one_softmax(dtype, tolerance, heads, kv_heads, training):
    torch.manual_seed(0)
    module = torch.nn.Identity().train(training)
    for groups in (GROUPS, *([group] for group in GROUPS)):
        layout = layout_of(groups)
        size = layout[-1].end
        query = 3 * torch.randn(1, heads, size, 16, dtype=dtype)
        key, value = (torch.randn(1, kv_heads, size, 16, dtype=dtype) for _ in range(2))
        found, weights = attend(module, query, key, value, None, scaling=0.3, layout=layout)
        expected = functional.scaled_dot_product_attention(
            *(part.float().repeat_interleave(heads // part.shape[1], 1) for part in (query, key, value)),
            attn_mask=mask_of(groups),
            scale=0.3,
        )
        assert weights is None
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance)

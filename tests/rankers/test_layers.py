"""Dropout and attention of the sequence models against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recllm.rankers import layers
from recllm.rankers.layers import Dropout, attention, dropout
from recllm.rankers.models.missrec import DecoderBlock


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(share):
    torch.manual_seed(0)
    x = torch.ones(301, 999, requires_grad=True)
    found = dropout(x, share)
    kept = found != 0
    assert kept.float().mean().item() == pytest.approx(1 - share, abs=0.005)
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - share)), rtol=2e-4, atol=0)
    (found.sum() * 2).backward()
    torch.testing.assert_close(x.grad, 2 * found.detach())


def test_dropout_draws_each_value_by_itself():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(4096, 64), 0.5) != 0).double()
    for one, other in ((kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:]), (kept[:, :-4], kept[:, 4:])):
        assert (one * other).mean().item() == pytest.approx(0.25, abs=0.005)
    assert kept.mean(0).std() < 0.01 and kept.mean(1).std() < 0.08


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5, 7)])
def test_dropout_takes_any_shape_and_repeats_with_its_seed(shape):
    x = torch.rand(shape, dtype=torch.float64).transpose(0, -1) if len(shape) > 1 else torch.rand(shape)
    torch.manual_seed(1)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(1)
    assert first.equal(dropout(x, 0.5)) and second.equal(dropout(x, 0.5))
    assert first.dtype == x.dtype and first.shape == x.shape


def test_dropout_is_of_training_alone():
    x = torch.rand(50, 50)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x).equal(x)
    assert not Dropout(0.5).train()(x).equal(x)
    assert not Dropout(1.0).train()(x).any()
    assert Dropout(1 - 1e-9).train()(x).isfinite().all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


@pytest.mark.parametrize("kind", ["all", "mask", "causal"])
def test_attention_with_dropout_is_that_of_torch_but_for_what_is_dropped(kind, monkeypatch):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 5, 4) for _ in range(3))
    mask = torch.rand(3, 1, 5, 5) < 0.5 if kind == "mask" else None
    if mask is not None:
        mask |= torch.eye(5, dtype=torch.bool)
    options = {"causal": kind == "causal"}
    expected = F.scaled_dot_product_attention(query, key, value, mask, is_causal=kind == "causal")
    dropped = attention(query, key, value, mask, 0.5, **options)
    assert not torch.allclose(dropped, expected)
    mean = sum(attention(query, key, value, mask, 0.5, **options) for _ in range(4000)) / 4000
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.15)
    torch.testing.assert_close(attention(query, key, value, mask, 0.0, **options), expected)
    monkeypatch.setattr(layers, "dropout", lambda x, _: x)
    torch.testing.assert_close(attention(query, key, value, mask, 0.5, **options), expected)


def test_a_decoder_block_is_that_of_torch():
    torch.manual_seed(0)
    block = DecoderBlock(8, 2, 16, 0.5).eval()
    reference = nn.TransformerDecoderLayer(8, 2, 16, 0.5, activation="gelu", batch_first=True).eval()
    with torch.no_grad():
        for ours, theirs in ((block.items, reference.self_attn), (block.interests, reference.multihead_attn)):
            ours.output = theirs.out_proj
            for name in ("weight", "bias"):
                joined = torch.cat([getattr(ours.query, name), getattr(ours.key_value, name)])
                getattr(theirs, f"in_proj_{name}").copy_(joined)
        for ours, theirs in zip(
            block.norms, (reference.norm1, reference.norm2, reference.norm3), strict=True
        ):
            ours.weight.normal_(), ours.bias.normal_()
            theirs.load_state_dict(ours.state_dict())
        reference.linear1, reference.linear2 = block.expand, block.contract
    items, interests = torch.randn(3, 6, 8), torch.randn(3, 4, 8)
    known, real = torch.arange(6) < torch.tensor([[6], [1], [3]]), torch.rand(3, 4) < 0.6
    real[:, 0] = True
    expected = reference(items, interests, tgt_key_padding_mask=~known, memory_key_padding_mask=~real)
    torch.testing.assert_close(block(items, items, known, interests, real), expected, rtol=1e-4, atol=1e-5)
    last = block(items[:, 2, None], items, known, interests, real)
    torch.testing.assert_close(last[:, 0], expected[:, 2], rtol=1e-4, atol=1e-5)

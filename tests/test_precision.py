"""Half precision on a CPU: only if the CPU has instructions for it, and said if it was asked for anyway."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from recllm import precision
from recllm.errors import DataError
from recllm.mllm import load
from recllm.training import launching
from recllm.training.options import SFTOptions
from tests.mllm.small_models import save_small

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bfloat16, and no GPU."""
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was saved in half precision."""
    folder = save_small("qwen2_vl", tmp_path_factory.mktemp("half") / request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, request.param))
    model.save_pretrained(folder)
    return folder


def test_saved_half_precision_computes_in_float32_on_a_cpu_without_it(without: None, half: Path) -> None:
    loaded = load(half)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    saved = AutoModelForImageTextToText.from_pretrained(half)
    assert saved.dtype != torch.float32
    for name, weight in saved.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight.float())
    assert load(half, quantization="nf4").model.dtype == torch.float32


def test_what_was_asked_for_is_done_and_said_to_be_slow(
    without: None, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(half, dtype="bfloat16").model.dtype == torch.bfloat16
    assert "no instructions for bfloat16" in capsys.readouterr().err
    load(half, dtype="float32")
    assert capsys.readouterr().err == ""


def test_a_cpu_that_has_bfloat16_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    assert precision.computed_in(torch.bfloat16, on_cpu=True) == torch.bfloat16
    assert precision.computed_in(torch.float16, on_cpu=True) == torch.float32
    assert precision.computed_in(torch.float16, on_cpu=False) == torch.float16


def test_mixed_precision_is_refused_where_nothing_has_it(without: None) -> None:
    assert not launching.uses_bf16(SFTOptions())
    with pytest.raises(DataError, match="no instructions for bfloat16"):
        launching.uses_bf16(SFTOptions(bf16="yes"))


def test_an_avx2_cpu_is_recognized() -> None:
    program = (
        "from recllm.precision import *; from recllm.runs.provenance import describe_machine\n"
        "print(cpu_has_bfloat16(), vector_instructions(), describe_machine())"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **AVX2},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if "AVX" not in told:
        pytest.skip("not an x86 CPU")
    assert told.startswith("False AVX2 ")
    assert "(AVX2)" in told


def test_an_export_in_bfloat16_needs_no_bfloat16_instructions(
    without: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recllm.training.export import ExportOptions, _computed_in

    assert _computed_in(ExportOptions(run=tmp_path, out=tmp_path)) == "float32"
    assert _computed_in(ExportOptions(run=tmp_path, out=tmp_path, dtype="float32")) == "float32"
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    assert _computed_in(ExportOptions(run=tmp_path, out=tmp_path)) == "bfloat16"

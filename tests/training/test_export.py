"""Exports score as base and adapter do; a merge that does not leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file, save_file

from recllm.errors import DataError
from recllm.files import read_json
from recllm.mllm import load
from recllm.mllm.scoring import YesNoScorer, score_table
from recllm.training import export as exporting
from recllm.training import hub
from recllm.training.export import ExportOptions, export
from recllm.training.options import SFTOptions
from tests.training.recipe import run_recipe


@pytest.fixture(scope="session")
def runs(world: Path, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A short run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for method, rate in (("lora", 5e-3), ("qlora", 5e-3), ("full", 3e-4)):
        options = SFTOptions(
            instructions=world / "instructions" / "plain",
            method=method,
            max_steps=4,
            batch_size=8,
            valid_every=4.0,
            valid_users=4,
            learning_rate=rate,
            schedule="constant",
            warmup=0.0,
            out=folder / method,
        )
        made[method] = run_recipe(options)
    return made


@pytest.fixture
def lora_run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the LoRA run, to be broken."""
    return copied(runs["lora"], tmp_path)


def copied(run: Path, folder: Path) -> Path:
    """Copies a run without its checkpoints."""
    return shutil.copytree(run, folder / f"{run.name}-copy", ignore=shutil.ignore_patterns("checkpoints"))


def margins(loaded: Any, run: Path, world: Path) -> np.ndarray:
    """Scores the stored prompts of a run."""
    probes = pl.read_parquet(run / "probes.parquet").drop("margin")
    return score_table(YesNoScorer(loaded), probes, world)["margin"].to_numpy()


def change_adapter(run: Path, change: Any) -> None:
    """Rewrites the tensors of a run's adapter."""
    path = run / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("method", "dtype", "bound"), [("lora", "float32", 1e-4), ("qlora", "bfloat16", 0.1)]
)
def test_the_export_is_a_plain_model_that_scores_as_base_and_adapter(
    method: str, dtype: str, bound: float, runs: dict[str, Path], world: Path, tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out = tmp_path / "out"
    export(ExportOptions(runs[method], out, dtype=dtype))
    expected = margins(load("tiny", adapter=runs[method]), runs[method], world)
    base = margins(load("tiny"), runs[method], world)
    exported = load(out)
    found = margins(exported, runs[method], world)
    np.testing.assert_allclose(found, expected, atol=bound)
    assert abs(found - expected).mean() < 0.2 * abs(found - base).mean()
    assert exported.identity["dtype"] == dtype
    assert not (out / "adapter_config.json").exists()
    _, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert AutoProcessor.from_pretrained(out).tokenizer.chat_template
    assert read_json(out / "manifest.json", "an export")["checks"]["merge"]["largest"] <= bound
    assert "rank correlation" in capsys.readouterr().out


def test_a_full_run_is_copied_in_the_number_type_asked_for(
    runs: dict[str, Path], world: Path, tmp_path: Path
) -> None:
    export(ExportOptions(runs["full"], tmp_path / "out"))
    exported = load(tmp_path / "out")
    assert exported.identity["dtype"] == "bfloat16"
    expected = margins(load(runs["full"]), runs["full"], world)
    np.testing.assert_allclose(margins(exported, runs["full"], world), expected, atol=0.1)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_code_on_the_card_loads_the_run(method: str, runs: dict[str, Path], tiny_path: Path) -> None:
    card = (runs[method] / "README.md").read_text().replace("base = 'tiny'", f"base = {str(tiny_path)!r}")
    ours, plain = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    found: dict[str, Any] = {}
    exec(ours, found)
    exec(plain, found)
    assert found["loaded"].identity["adapter" if method == "lora" else "model"]
    tuned = found["model"].state_dict()
    assert method == "full" or any(each.any() for name, each in tuned.items() if "lora_B" in name)
    assert found["processor"].tokenizer.chat_template


def lose_the_adapter(model: Any, run: Path) -> Any:
    """Merges nothing, as a merge does whose layers were renamed."""
    return model.unload()


def merge_one_layer_twice(model: Any, run: Path) -> Any:
    """Adds one layer's update once too often."""
    layer = model.get_base_model().get_decoder().layers[0].mlp.down_proj
    layer.base_layer.weight.data += 3 * layer.get_delta_weight("default")
    return model.merge_and_unload()


@pytest.mark.parametrize(
    ("fault", "dtype", "message"),
    [
        (lose_the_adapter, "bfloat16", "the merge lost the adapter"),
        (lose_the_adapter, "float32", "the merge lost the adapter"),
        (merge_one_layer_twice, "float32", "lost the adapter|scores a stored prompt by"),
    ],
)
def test_a_merge_that_goes_wrong_fails_and_leaves_nothing(
    fault: Any,
    dtype: str,
    message: str,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "merged", fault)
    with pytest.raises(DataError, match=message):
        export(ExportOptions(runs["lora"], tmp_path / "deep" / "out", dtype=dtype))
    assert not list(tmp_path.iterdir())


def test_an_adapter_with_renamed_keys_fails(lora_run: Path, tmp_path: Path) -> None:
    change_adapter(
        lora_run,
        lambda tensors: {name.replace("language_model", "text"): each for name, each in tensors.items()},
    )
    with pytest.raises(DataError, match=r"tensors were (not consumed|missing)"):
        export(ExportOptions(lora_run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_does_nothing_fails(lora_run: Path, tmp_path: Path) -> None:
    change_adapter(
        lora_run,
        lambda tensors: {name: each * 0 if "lora_B" in name else each for name, each in tensors.items()},
    )
    with pytest.raises(DataError, match="the adapter does nothing"):
        export(ExportOptions(lora_run, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def one_off(margins: np.ndarray) -> np.ndarray:
    """One margin by a third."""
    return margins + 0.3 * (np.arange(len(margins)) == 2)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("spoil", [lambda margins: -10 * margins, one_off, lambda margins: margins + 0.3])
def test_stored_margins_of_another_model_fail_and_the_old_export_stays(
    method: str, spoil: Any, runs: dict[str, Path], tmp_path: Path
) -> None:
    run, out = copied(runs[method], tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"kind": "exported model"}')
    probes = pl.read_parquet(run / "probes.parquet")
    margins = pl.Series(spoil(probes["margin"].to_numpy()))
    probes.with_columns(margin=margins).write_parquet(run / "probes.parquet")
    with pytest.raises(DataError, match="no longer scores its stored prompts as it did"):
        export(ExportOptions(run, out, overwrite=True))
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    assert {path.name for path in tmp_path.iterdir()} == {run.name, "out"}


def test_an_adapter_that_was_changed_fails(runs: dict[str, Path], tmp_path: Path) -> None:
    run = copied(runs["qlora"], tmp_path)
    change_adapter(
        run, lambda tensors: {name: each * (30 if "lora_B" in name else 1) for name, each in tensors.items()}
    )
    with pytest.raises(DataError, match="no longer scores its stored prompts"):
        export(ExportOptions(run, tmp_path / "out"))


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_none_is_refused(lora_run: Path, tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(DataError, match="expected 0 or more"):
        export(ExportOptions(lora_run, tmp_path / "out", tolerance=tolerance))


def test_a_run_is_not_replaced_by_its_export(lora_run: Path) -> None:
    with pytest.raises(DataError, match="is a sft run"):
        export(ExportOptions(lora_run, lora_run, overwrite=True))
    assert (lora_run / "adapter_model.safetensors").is_file()


def test_what_exists_is_not_replaced_unasked_and_what_is_no_run_is_refused(
    runs: dict[str, Path], lora_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        export(ExportOptions(runs["lora"], tmp_path / "out"))
    with pytest.raises(DataError, match="not made by recllm"):
        export(ExportOptions(runs["lora"], tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        export(ExportOptions(tmp_path / "out", tmp_path / "other"))
    (lora_run / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match="has not ended"):
        export(ExportOptions(lora_run, tmp_path / "other"))


def test_a_dataset_that_was_moved_is_asked_for_and_found(lora_run: Path, world: Path, tmp_path: Path) -> None:
    manifest = json.loads((lora_run / "manifest.json").read_text())
    manifest["instructions"]["dataset"] = str(tmp_path / "gone")
    (lora_run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="say --dataset FOLDER"):
        export(ExportOptions(lora_run, tmp_path / "out"))
    export(ExportOptions(lora_run, tmp_path / "out", dtype="float32", dataset=world))
    assert (tmp_path / "out" / "model.safetensors").is_file()


class FakeHub:
    """Takes what would be uploaded."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repository: str, **options: Any) -> str:
        self.calls.append(("create", {"repository": repository, **options}))
        return f"https://hub/{repository}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_a_push_makes_a_private_repository_without_prompts_and_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    assert hub.push_folder(tmp_path, "me/shop") == "https://hub/me/shop"
    (_, create), (_, upload) = fake.calls
    assert create["private"]
    assert (upload["repo_id"], upload["folder_path"]) == ("me/shop", tmp_path)
    files = [
        "README.md",
        "adapter_model.safetensors",
        "probes.parquet",
        "checkpoints/checkpoint-1/optimizer.pt",
    ]
    kept = filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"])
    assert list(kept) == ["README.md", "adapter_model.safetensors"]


def test_a_push_that_cannot_be_made_says_how_to_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"(?s)me/shop.*hf upload me/shop"):
        hub.push_folder(tmp_path, "me/shop")
    with pytest.raises(DataError, match="expected USER/NAME"):
        hub.push_folder(tmp_path, "no/such/name")
    with pytest.raises(DataError, match="no such folder"):
        hub.push_folder(tmp_path / "gone", "me/shop")

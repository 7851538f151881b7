"""The curves: small pictures that show the log, whatever the run is called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from recllm.errors import DataError
from recllm.training.curves import draw_curves, smoothed


def write_run(run: Path, steps: int, best: int | None = None) -> Path:
    """Writes a log of a falling loss and a rising AUC."""
    run.mkdir()
    lines = [{"step": 0, "valid_auc": 0.5, "valid_ndcg@10": 0.2}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 5 / step})
        if step % 10 == 0:
            lines.append({"step": step, "valid_auc": 0.5 + step / (3 * steps), "valid_ndcg@10": 0.3})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if best is not None:
        (run / "metrics.json").write_text(json.dumps({"best_step": best}))
    return run


@pytest.mark.parametrize("name", ["run", r"$\frac{", "x" * 200, "a_b^c%"])
@pytest.mark.parametrize("steps", [1, 300])
def test_both_pictures_are_small_files_that_can_be_opened(tmp_path: Path, name: str, steps: int) -> None:
    run = write_run(tmp_path / name, steps, best=0)
    draw_curves(run)
    for picture in ("loss.png", "auc.png"):
        assert (run / picture).stat().st_size < 100_000
        with Image.open(run / picture) as image:
            image.load()
            assert image.width > 500


def test_the_best_step_is_marked_in_both_pictures(tmp_path: Path) -> None:
    plain, marked, later = (
        write_run(tmp_path / name, 40, best) for name, best in (("a", None), ("b", 10), ("c", 30))
    )
    pictures = []
    for run in (plain, marked, later):
        run = run.rename(tmp_path / "run")  # which is in the title
        draw_curves(run)
        pictures.append([(run / name).read_bytes() for name in ("loss.png", "auc.png")])
        run.rename(tmp_path / f"done{len(pictures)}")
    assert all(len({pictures[run][kind] for run in range(3)}) == 3 for kind in range(2))


def test_a_log_without_validation_or_cut_off_by_a_kill_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 5)
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join(line for line in lines if "loss" in line) + '\n{"step": 6, "lo')
    draw_curves(run)
    assert (run / "auc.png").stat().st_size > 1000


def test_an_empty_log_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(DataError, match=r"log\.jsonl: no loss and no validation"):
        draw_curves(tmp_path)


def test_the_running_mean_is_of_the_latest_values_alone() -> None:
    assert smoothed([4.0] * 7) == [4.0] * 7
    assert smoothed([1, 2, 3, 4, 5, 6.0]) == [1, 1.5, 2, 2.5, 3, 4]

"""The scripts as users run them, the files that they write, and the Hugging Face metric, offline."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.errors import DataError
from recllm.evaluation import Candidates, RankRecords, read_systems, tables
from recllm.evaluation.commands import comparison_table, report_table

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = r"50%_\input{x} & $y^2$ [a] =1+1, <b>" + '"~#\n\x1b[31m'


def run(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def files(tmp_path) -> Path:
    """A candidate file of 40 lists of 1 + 5, and the scores of a good, a poor and a nameless system."""
    rng = np.random.default_rng(0)
    users = [f"u{u}" for u in range(40) for _ in range(6)]
    items = [f"{u}" if place == 0 else f"n{place}" for u in range(40) for place in range(6)]
    targets = [f"{u}" for u in range(40) for _ in range(6)]
    labels = np.tile([1, 0, 0, 0, 0, 0], 40)
    candidates = pl.DataFrame({"user": users, "target": targets, "item": items, "label": labels})
    candidates.write_parquet(tmp_path / "test.parquet", metadata={"recllm.protocol": "loo/1+5-uniform-seed1"})
    (tmp_path / "scores").mkdir()
    for name, strength in (("good", 2.0), ("poor", 0.2)):
        scores = candidates.select("user", "item", score=rng.normal(size=240) + strength * labels)
        metadata = {"recllm.protocol": "loo/1+5-uniform-seed1", "recllm.system": name}
        scores.write_parquet(tmp_path / f"scores/{name}.parquet", metadata=metadata)
    scores.with_columns(pl.col("score").round(0)).write_csv(tmp_path / "scores/coarse.csv")
    return tmp_path


def test_rank_report_then_compare_runs(files):
    done = run(
        *(
            ROOT / "eval/rank_report.py",
            *sorted((files / "scores").iterdir()),
            "--candidates",
            "test.parquet",
        ),
        *("--ks", "1", "3", "--out", "out", "--save-ranks", "ranks", "--resamples", "5000"),
        cwd=files,
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines() if line}
    assert "Protocol loo/1+5-uniform-seed1" in lines
    assert lines["ndcg@3"].count("†") == 2 and {"pooled auc", "tie rate", "users"} <= lines.keys()
    report = json.loads((files / "out/metrics.json").read_text())
    assert report["protocol"] == "loo/1+5-uniform-seed1" and report["systems"]["coarse"]["tie_rate"] > 0.3
    with (files / "out/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows[:3]] == ["coarse", "good", "poor"]
    assert float(rows[0]["low"]) <= float(rows[0]["value"]) <= float(rows[0]["high"])
    assert (files / "out/metrics.tex").read_text().count(r"\textbf") == len(rows) // 3

    done = run(
        *(ROOT / "eval/compare_runs.py", "ranks/good.parquet", "ranks/poor.parquet", "ranks/coarse.parquet"),
        *("--metrics", "ndcg@3", "auc", "--out", "out", "--resamples", "5000"),
        cwd=files,
    )
    assert done.returncode == 0, done.stderr
    comparison = json.loads((files / "out/comparison.json").read_text())["figures"]
    assert [(row["metric"], row["b"]) for row in comparison] == [
        *(("ndcg@3", "poor"), ("auc", "poor"), ("ndcg@3", "coarse"), ("auc", "coarse"))
    ]
    assert all(row["low"] > 0 and row["permutation_p_holm"] < 0.05 for row in comparison)
    measured = {row["metric"]: float(row["value"]) for row in rows if row["system"] == "good"}
    assert comparison[0]["mean_a"] == measured["ndcg@3"]


def test_mistakes_are_one_message_without_a_traceback(files):
    for arguments, message in [
        (["scores/good.parquet"], "--candidates"),
        (["scores/no.parquet"], "no such file"),
        (["test.parquet"], "neither scores"),
        (["scores/good.parquet", "--candidates", "scores/good.parquet"], "no column 'label'"),
        (["scores/good.parquet", "--candidates", "test.parquet", "--metrics", "ndgc@3"], "'ndcg'"),
    ]:
        done = run(ROOT / "eval/rank_report.py", *arguments, cwd=files)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_two_protocols_do_not_share_a_table(files):
    candidates = Candidates.read(files / "test.parquet")
    good = read_systems((files / "scores/good.parquet",), candidates)[0].records
    for name, protocol in (("a", "loo/full"), ("b", "loo/1+20")):
        RankRecords(
            *(good.user, good.item, good.above, good.tied, good.n), lists="target", protocol=protocol
        ).save(files / f"{name}.parquet")
    with pytest.raises(DataError, match=r"a\.parquet was .*'loo/full'.*b\.parquet under 'loo/1\+20'"):
        read_systems((files / "a.parquet", files / "b.parquet"))
    scores = pl.read_parquet(files / "scores/good.parquet")
    scores.write_parquet(files / "other.parquet", metadata={"recllm.protocol": "loo/full"})
    with pytest.raises(DataError, match=r"other\.parquet was scored under 'loo/full'"):
        read_systems((files / "other.parquet",), candidates)
    candidates.frame.write_parquet(files / "anonymous.parquet")
    anonymous = Candidates.read(files / "anonymous.parquet").protocol
    assert anonymous.startswith("candidates-") and len(anonymous) == len("candidates-") + 12


def test_equal_names_are_told_apart_and_ignored_rows_reported(files):
    scores = pl.read_csv(files / "scores/coarse.csv", schema_overrides={"item": pl.String})
    stranger = pl.DataFrame({"user": ["nobody"], "item": ["1"], "score": [1.0]})
    pl.concat([scores, stranger]).write_csv(files / "coarse.csv")
    paths = files / "scores/coarse.csv", files / "coarse.csv"
    systems = read_systems(paths, Candidates.read(files / "test.parquet"))
    table = report_table(systems, (1,), resamples=50)
    assert table.columns[1:] == [f"coarse ({path})" for path in paths]
    assert any("1 score rows are no candidates" in note for note in table.notes)
    assert comparison_table(systems, names=("hr@1",), resamples=50).records[0]["difference"] == 0
    (files / "coarse.csv").write_text("user,item,score\nu0,0,high\n")
    with pytest.raises(DataError, match=r"coarse\.csv: row 0: score 'high' is not a number"):
        read_systems(paths[1:], Candidates.read(files / "test.parquet"))


def test_hostile_names_stay_names(tmp_path, capsys):
    figures = [{"system": HOSTILE, "metric": "mrr", "value": 0.5, "p": float("nan"), "d": float("inf")}]
    table = tables.Table(
        HOSTILE, ["", HOSTILE], [["mrr", "0.5"]], figures, {"protocol": "p"}, {(0, 1)}, [HOSTILE]
    )
    tables.write(table, tmp_path, "t")
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["figures"] == [{**figures[0], "p": None, "d": "inf"}]
    with (tmp_path / "t.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["system"] == HOSTILE
    tex = (tmp_path / "t.tex").read_text()
    row = next(line for line in tex.splitlines() if line.startswith(" & "))
    assert row == (
        r" & 50\%\_\textbackslash{}input\{x\} \& \$y\textasciicircum{}2\$ {[}a{]} =1+1, "
        '\\textless{}b\\textgreater{}"\\textasciitilde{}\\#\ufffd\ufffd{[}31m \\\\'
    )
    tables.show(table)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"50%_\input{x}" in printed


def test_a_terminal_gets_a_rich_table(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    table = tables.Table("[b]title", ["", "sys[red]tem"], [["mrr", "0.5"]], [], {}, {(0, 1)}, ["note"])
    tables.show(table)
    printed = capsys.readouterr().out
    assert "[b]title" in printed and "sys[red]tem" in printed and "0.5" in printed


def test_the_library_does_not_import_what_is_for_tests_and_benchmarks():
    imports = {
        line.split()[1].split(".")[0]
        for path in (ROOT / "recllm/evaluation").glob("*.py")
        for line in map(str.strip, path.read_text().splitlines())
        if line.startswith(("import ", "from "))
    }
    assert "numpy" in imports
    assert not imports & {"ranx", "pytrec_eval", "sklearn", "pandas", "hypothesis"}
    heavy = {"torch", "scipy", "rich", "tyro", "evaluate"}
    light = f"import sys, recllm.evaluation; print({heavy} & set(sys.modules))"
    assert run("-c", light, cwd=ROOT).stdout.strip() == "set()"


def test_the_hugging_face_metric_loads_offline(tmp_path):
    readme = (ROOT / "eval/metrics/ranking/README.md").read_text()
    example = (
        readme.split("```python")[1].split("```")[0].replace("ranking.compute(", "found = ranking.compute(")
    )
    example = example.replace("eval/metrics/ranking", str(ROOT / "eval/metrics/ranking"))
    script = example + (
        "\nassert all(type(value) is float for value in found.values()), found"
        "\nwanted = {'hr@1': 0.75, 'ndcg@1': 0.75, 'auc': 0.75, 'pooled_auc': 0.875, 'tie_rate': 0.5}"
        "\nassert wanted.items() <= found.items(), found"
        "\nassert 'hr@5' in ranking.compute(predictions=[1.0, 0.0], references=[1, 0], queries=['a', 'a'])"
    )
    (tmp_path / "example.py").write_text(script)
    done = run("example.py", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr

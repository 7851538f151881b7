"""The scripts as users run them, the files that they write, and the Hugging Face metric, offline."""

import csv
import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.errors import DataError
from recllm.evaluation import Candidates, RankRecords, read_systems, tables
from recllm.evaluation.commands import (
    CompareRunsConfig,
    RankReportConfig,
    compare_runs,
    comparison_table,
    rank_report,
    report_table,
)

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
    assert {row["protocol"] for row in rows} == {"loo/1+5-uniform-seed1"}
    tex = (files / "out/metrics.tex").read_text()
    assert tex.count(r"\textbf") == len(rows) // 3
    assert "\\toprule\n\\multicolumn{4}{l}{Protocol loo/1+5-uniform-seed1} \\\\\n\\midrule\n" in tex

    done = run(
        *(ROOT / "eval/compare_runs.py", "ranks/good.parquet", "ranks/poor.parquet", "ranks/coarse.parquet"),
        *("--metrics", "ndcg@3", "auc", "--out", "out", "--resamples", "5000"),
        cwd=files,
    )
    assert done.returncode == 0, done.stderr
    comparison = json.loads((files / "out/comparison.json").read_text())["figures"]
    assert {row["protocol"] for row in comparison} == {"loo/1+5-uniform-seed1"}
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
        (["--candidates", "test.parquet", "--metrics", "mrr", "scores/good.parquet"], "put the files first"),
        (["--metrics", "mrr"], "no score or rank files were given; put them first"),
        (["scores/good.parquet", "--candidates", "test.parquet", "--ks", "0"], "cutoff 0: cutoffs (--ks)"),
        (["scores/good.parquet", "--seed", "-1"], "seed is -1"),
        (["scores/good.parquet", "--resamples", "0"], "resamples is 0"),
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
    for name in ("test", "valid"):
        protocol = "loo/1+5-uniform-seed1/valid" if name == "valid" else "loo/1+5-uniform-seed1"
        replace(good, protocol=protocol, candidates="").save(files / f"ranks-{name}.parquet")
    pair = files / "ranks-test.parquet", files / "ranks-valid.parquet"
    for command, options in ((rank_report, RankReportConfig), (compare_runs, CompareRunsConfig)):
        with pytest.raises(DataError, match=r"'loo/1\+5-uniform-seed1' .*'loo/1\+5-uniform-seed1/valid'"):
            command(options(pair))
    scores = pl.read_parquet(files / "scores/good.parquet")
    scores.write_parquet(files / "other.parquet", metadata={"recllm.protocol": "loo/full"})
    with pytest.raises(DataError, match=r"other\.parquet was scored under 'loo/full'"):
        read_systems((files / "other.parquet",), candidates)
    candidates.frame.write_parquet(files / "anonymous.parquet")
    anonymous = Candidates.read(files / "anonymous.parquet").protocol
    assert anonymous.startswith("candidates-") and len(anonymous) == len("candidates-") + 12


def test_two_candidate_sets_of_one_protocol_do_not_share_a_table(files):
    """As when the same commands draw from another catalog."""
    candidates = Candidates.read(files / "test.parquet")
    metadata = {"recllm.protocol": candidates.protocol}
    other_items = pl.when(pl.col("item") == "n1").then(pl.lit("n9")).otherwise(pl.col("item"))
    candidates.frame.with_columns(other_items.alias("item")).write_parquet(
        files / "other.parquet", metadata=metadata
    )
    scores = pl.read_parquet(files / "scores/good.parquet")
    scores.with_columns(other_items.alias("item")).write_parquet(files / "scores/other.parquet")
    other = Candidates.read(files / "other.parquet")
    ours = read_systems((files / "scores/good.parquet", files / "scores/poor.parquet"), candidates)
    theirs = read_systems((files / "scores/other.parquet",), other)
    assert ours[0].records.candidates == candidates.fingerprint != other.fingerprint
    differ = "measured under 'loo/1\\+5-uniform-seed1', but their candidates differ"
    unknown = [replace(ours[1], records=replace(ours[1].records, candidates=""))]
    for table in (report_table, comparison_table):
        table(unknown + ours[:1], (1,), resamples=50)
        for systems in (ours + theirs, unknown + ours[:1] + theirs):
            with pytest.raises(DataError, match=f"good and other were both {differ}"):
                table(systems, (1,), resamples=50)
    for name, system in (("a", ours[0]), ("b", theirs[0]), ("unknown", unknown[0])):
        system.records.save(files / f"{name}.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet and .*b\.parquet were both {differ}"):
        read_systems(tuple(files / f"{name}.parquet" for name in ("unknown", "a", "b")))
    # rank records beside --candidates
    read_systems((files / "a.parquet", files / "unknown.parquet", files / "scores/poor.parquet"), candidates)
    with pytest.raises(DataError, match=r"b\.parquet and .*test\.parquet have the same .* candidates differ"):
        read_systems((files / "b.parquet",), candidates)
    replace(ours[0].records, protocol="loo/full").save(files / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet was measured under 'loo/full', but .*test\.parquet is"):
        read_systems((files / "a.parquet",), candidates)
    # the same lists in another order, in another kind of file
    candidates.frame.reverse().write_csv(files / "test.csv")
    assert Candidates.read(files / "test.csv").fingerprint == candidates.fingerprint


def test_no_rank_records_are_lost_to_another_file(files):
    names = "scores/good.parquet", "scores/poor.parquet", "poor.csv.gz"
    good, poor, packed = (files / name for name in names)
    packed.write_bytes(gzip.compress(pl.read_parquet(poor).write_csv().encode()))
    options = {"candidates": files / "test.parquet", "resamples": 50, "metrics": ("mrr",)}
    for paths, folder, message in [
        (
            (good, poor, packed),
            "ranks",
            r"poor\.parquet and .*poor\.csv\.gz would both go to .*poor",
        ),
        ((good, poor), "scores", r"scores/good\.parquet is one of the files to measure"),
    ]:
        before = sorted(files.rglob("*"))
        with pytest.raises(DataError, match=message):
            rank_report(RankReportConfig(paths, save_ranks=files / folder, out=files / "out", **options))
        assert sorted(files.rglob("*")) == before
    table = rank_report(RankReportConfig((good, packed), save_ranks=files / "ranks", **options))
    assert table.columns[1:] == ["good", "poor"]
    records = RankRecords.load(files / "ranks/poor.parquet")
    assert (
        records.above.tolist()
        == read_systems((poor,), Candidates.read(options["candidates"]))[0].records.above.tolist()
    )


def test_names_of_files_are_not_patterns_and_unreadable_ones_say_what_is(files):
    for kind in ("csv", "parquet"):
        good = pl.read_parquet(files / "scores/good.parquet")
        for name, frame in ((f"run[1].{kind}", good), (f"run1.{kind}", good[:1])):
            frame.write_csv(files / name) if kind == "csv" else frame.write_parquet(files / name)
        system = read_systems((files / f"run[1].{kind}",), Candidates.read(files / "test.parquet"))[0]
        assert len(system.records) == 40
    for name in ("mine.tsv", "mine.csv.gz"):
        (files / name).write_bytes(b"\x1f\x8bno")
        with pytest.raises(DataError, match=rf"{name}: not readable .*\.csv or \.csv\.gz"):
            read_systems((files / name,), None)


def test_hypotheses_that_are_one_are_tested_once(files):
    scores = files / "scores"
    systems = read_systems(
        (scores / "good.parquet", scores / "poor.parquet"), Candidates.read(files / "test.parquet")
    )
    for table in (report_table, comparison_table):
        shown = table(systems, (1, 3), resamples=50)
        told = list(dict.fromkeys(record["metric"] for record in shown.records))
        assert told == ["hr@1", "hr@3", "ndcg@3", "mrr", "auc"]
        assert any("recall@k = hr@k" in note for note in shown.notes)
        named = table(systems, names=("recall@3", "map"), resamples=50)
        assert {record["metric"] for record in named.records} == {"recall@3", "map"}
        assert not any("recall@k = hr@k" in note for note in named.notes)
    chosen = "The best system is chosen by the data that it is then tested on"
    assert any(chosen in note for note in report_table(systems, resamples=50).notes)
    assert not any(chosen in note for note in report_table(systems[:1], resamples=50).notes)
    several = pl.read_parquet(files / "test.parquet").drop("target")
    several = several.with_columns(label=((pl.col("label") == 1) | (pl.col("item") == "n1")).cast(pl.Int8))
    several.write_parquet(files / "several.parquet")
    systems = read_systems((scores / "coarse.csv",), Candidates.read(files / "several.parquet"))
    assert len(report_table(systems, (1, 3), resamples=50).records) == 2 * 6 + 3


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


def test_a_file_stands_in_a_table_once(files):
    candidates = files / "test.parquet"
    good, poor = files / "scores/good.parquet", files / "scores/poor.parquet"
    again = files / "scores/../scores/good.parquet"
    for config, run in ((RankReportConfig, rank_report), (CompareRunsConfig, compare_runs)):
        with pytest.raises(DataError, match=r"good\.parquet is given twice \(as "):
            run(config((good, poor, again), candidates))
    system = read_systems((good,), Candidates.read(candidates))[0]
    for table in (report_table, comparison_table):
        with pytest.raises(DataError, match=r"good\.parquet is given twice; give every file once"):
            table([system, system], resamples=10)
        table([system, replace(system, records=replace(system.records, system="renamed"))], resamples=10)


@pytest.mark.parametrize("kind", [".csv", ".csv.gz"])
def test_a_header_that_names_a_column_twice_is_refused(files, kind):
    path = files / f"twice{kind}"
    write = gzip.open if kind.endswith("gz") else open
    for header, message in (
        ("user,item,score,score", "'score' stands more than once"),
        ("user,item,a,a_duplicated_0", "no numeric column 'score'"),
    ):
        with write(path, "wt") as file:
            file.write(f'{header}\nu0,"0",1,2\n')
        with pytest.raises(DataError, match=message):
            read_systems((path,), Candidates.read(files / "test.parquet"))


def test_a_file_name_that_is_no_text_is_refused(files):
    path = Path(os.fsdecode(os.fsencode(files) + b"/caf\xe9.parquet"))
    (files / "scores/good.parquet").rename(path)
    with pytest.raises(DataError, match=r"udce9\.parquet': the name of the file is not UTF-8; rename it"):
        rank_report(RankReportConfig((path,), files / "test.parquet"))
    result = run(ROOT / "eval/rank_report.py", path, "--candidates", files / "test.parquet", cwd=files)
    assert result.returncode and "Traceback" not in result.stderr and "not UTF-8" in result.stderr


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
        "\nimport numpy as np"
        "\nrows = dict(predictions=[0.9, 0.1, 0.4, 0.4], references=[1, 0, 1, 0])"
        "\nfor queries in ([7, 7, 1, 1], np.array([7, 7, 1, 1]), np.array([7, 7, 1, 1], np.int32)):"
        "\n    for ks in (1, np.int64(1), [1]):"
        "\n        assert ranking.compute(**rows, queries=queries, ks=ks) == found, (queries, ks)"
    )
    (tmp_path / "example.py").write_text(script)
    done = run("example.py", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr

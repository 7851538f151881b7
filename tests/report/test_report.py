"""The page as a whole: its numbers are those of the evaluation, nothing breaks out, what lacks is said."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import time
from base64 import b64decode
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from recllm.config import parse_config
from recllm.errors import DataError
from recllm.evaluation import Candidates, pooled_auc, read_system, read_systems
from recllm.evaluation.commands import report_table
from recllm.report.commands import report
from recllm.report.options import ReportOptions
from recllm.report.protocols import explain
from recllm.report.text import REPLACEMENT, clean, names
from tests.report.worlds import PROTOCOL, Page, World, make_world

SECTIONS = [
    *("results", "protocol", "data", "training", "cutoffs", "history", "ablation", "curves"),
    *("calibration", "trust", "examples", "making", "sources"),
]


def test_the_main_table_is_that_of_the_evaluation_figure_by_figure(world: World, full: Path) -> None:
    files = tuple(world.root / "scores" / f"{name}.parquet" for name in ("good", "fair", "plain"))
    candidates = Candidates.read(world.candidates)
    expected = report_table(read_systems(files, candidates), (1, 5, 10, 20), resamples=2000, seed=0)
    table = Page(full).tables["table-main"]
    assert table[0][1:] == ["good", "fair", "plain"]
    for shown, row in zip(table[1:], expected.rows, strict=True):
        assert shown[0].lower() == row[0]
        for cell, text in zip(shown[1:], row[1:], strict=True):
            assert sorted(re.findall(r"[\d.]+|†", cell)) == sorted(re.findall(r"[\d.]+|†", text))
    written = json.loads((full.parent / "metrics.json").read_text())
    assert [one["value"] for one in written["figures"]] == [one["value"] for one in expected.records]
    assert all(note in Page(full).text for note in expected.notes)


def test_the_answer_says_who_wins_and_whether_it_is_significant(world: World, full: Path) -> None:
    assert "good ranks best of 3 systems by AUC and NDCG@10." in Page(full).text
    assert re.search(
        r"AUC is 0\.\d+ \[[\d., ]+\] against 0\.\d+ of fair \(significant, p = 0\.\d+\)", Page(full).text
    )
    plain, good = (world.root / "scores" / f"{name}.parquet" for name in ("plain", "good"))
    lost = Page(world.report(plain, good, out="lost")).text
    assert "(too few resamples to tell)" not in lost
    assert "(too few resamples to tell)" in Page(world.report(plain, good, out="few", resamples=100)).text
    assert "plain does not win: by AUC and NDCG@10 another system is ahead." in lost
    assert "includes 0.5: it cannot be told from guessing" in lost
    alone = Page(world.report(good, out="alone")).text
    assert re.search(r"good reaches AUC 0\.\d+ \[.*\] on 40 users; nothing stands beside it", alone)
    twin = shutil.copy(good, world.root / "scores" / "twin.parquet")
    assert "(equal)" in Page(world.report(good, Path(twin), out="equal")).text


def test_every_section_stands_in_a_full_report(full: Path) -> None:
    page = Page(full)
    assert [given["id"] for tag, given in page.tags if tag == "section"] == SECTIONS
    assert page.missing == {}
    assert len(list((full.parent / "figures").glob("*.svg"))) == page.source.count("<svg")


def test_what_was_not_given_is_said_with_the_option_that_shows_it(world: World) -> None:
    page = Page(world.report(world.scores("bare", 1.0, probability=False), out="bare"))
    assert {section: text for section, text in page.missing.items() if section in SECTIONS}.keys() == {
        *("data", "training", "history", "ablation", "calibration", "examples")
    }
    for section, option in {
        "data": "--dataset",
        "history": "--dataset",
        "ablation": "--ablation",
        "examples": "--dataset",
    }.items():
        assert option in page.missing[section]
    no_prompts = Page(world.report(world.scores("bare", 1.0), out="bare", dataset=world.dataset))
    assert "--instructions" in no_prompts.missing["examples"]


def test_rank_records_take_part_where_ranks_suffice(world: World) -> None:
    scores, good = world.scores("ranked", 1.0, seed=3), world.scores("good", 3.0)
    read_system(scores, Candidates.read(world.candidates)).records.save(world.root / "ranks.parquet")
    page = Page(world.report(good, world.root / "ranks.parquet", out="mixed", dataset=world.dataset))
    by_scores = Page(world.report(good, scores, out="scored", dataset=world.dataset))
    row = next(row for row in page.tables["table-main"] if row[0] == "AUC")
    assert row == next(row for row in by_scores.tables["table-main"] if row[0] == "AUC")
    assert next(row for row in page.tables["table-main"] if row[0] == "pooled AUC")[2] == "-"
    assert "Missing here, as they came as rank records without scores: ranked." in page.text
    only = Page(
        world.report(world.root / "ranks.parquet", out="only", candidates=None, dataset=world.dataset)
    )
    assert "rank records" in only.missing["curves"] and "rank records" in only.missing["examples"]
    assert len(only.tables["table-history"]) == 3


def test_calibration_is_that_of_brute_force(world: World, full: Path) -> None:
    rows = world.rows().join(
        pl.read_parquet(world.root / "scores" / "good.parquet"), on=["user", "target", "item"]
    )
    p, y = rows["probability"].to_numpy().astype(float), rows["label"].to_numpy()
    error = 0.0
    for place in range(15):
        inside = (p > place / 15) & (p <= (place + 1) / 15)
        error += abs(p[inside].sum() - y[inside].sum()) / len(p)
        assert f"{place / 15:.3f}–{(place + 1) / 15:.3f}{inside.sum():,}" in Page(full).text
    row = next(row for row in Page(full).tables["table-calibration"] if row[0] == "good")
    assert row[1] == f"{((p - y) ** 2).mean():.4f}" and row[3] == f"{error:.4f}"
    outside = next(row for row in Page(full).tables["table-trust"] if row[0] == "good")
    assert outside[2] == f"{rows['outside'].to_numpy().astype(float).mean():.4f}"


def test_bins_of_history_count_what_was_known_of_each_user(world: World, full: Path) -> None:
    log = pl.concat([world.split.scan("train"), world.split.scan("valid")]).collect()
    known = dict(log.group_by("user").len().iter_rows())
    table = Page(full).tables["table-history"]
    records = read_system(world.root / "scores" / "fair.parquet", Candidates.read(world.candidates)).records
    above = dict(zip(records.user, records.above, strict=True))
    row = next(row for row in table if row[0] == "AUC, fair")
    counted = 0
    for cell, shown in zip(table[0][1:], row[1:], strict=True):
        low, high, users = re.fullmatch(r"(\d+)(?:–(\d+))? (\d+) users", cell).groups()
        inside = [user for user, count in known.items() if int(low) <= count <= int(high or low)]
        assert len(inside) == int(users)
        counted += len(inside)
        assert shown.startswith(f"{np.mean([1 - above[user] / 20 for user in inside]):.4f} [")
    assert counted == 40


def test_the_pooled_curves_say_the_pooled_auc(world: World, full: Path) -> None:
    rows = world.rows().join(
        pl.read_parquet(world.root / "scores" / "fair.parquet"), on=["user", "target", "item"]
    )
    area = pooled_auc(rows["score"].to_numpy(), rows["label"].to_numpy())
    assert f"fair: area {area:.3f}" in Page(full).text
    assert next(row for row in Page(full).tables["table-main"] if row[0] == "pooled AUC")[2] == f"{area:.4f}"


def test_examples_show_known_items_prompts_texts_and_the_list_as_ranked(world: World, full: Path) -> None:
    page = Page(full)
    examples = page.source.split('<article class="example">')[1:]
    assert len(examples) == 6
    rows = world.rows().join(
        pl.read_parquet(world.root / "scores" / "good.parquet"), on=["user", "target", "item"]
    )
    log = pl.concat([world.split.scan("train"), world.split.scan("valid")]).collect()
    for example in examples:
        user = re.search(r"user <bdi>(u\d+)</bdi>, the positive at rank (\S+) of 21", example)
        listed = rows.filter(pl.col("user") == user[1]).sort("score", descending=True)
        assert listed["label"].to_list().index(1) + 1 == float(user[2])
        titles = [f"Thing {int(item[1:])}" for item in listed["item"]]
        table = example.split('class="table"', 1)[1]
        order = re.findall(r"<bdi>(Thing \d+)</bdi>", table)
        positive = titles[int(float(user[2])) - 1]
        top = titles[:5] if positive in titles[:5] else [*titles[:5], positive]
        assert order == [*top, *(title for title in titles if title not in top)]
        known = log.filter(pl.col("user") == user[1]).sort("timestamp")["item"].to_list()[-8:]
        strip = re.search(r'<ol class="strip".*?</ol>', example, re.S)[0]
        assert re.findall(r"<bdi>(Thing \d+)</bdi>", strip) == [f"Thing {int(item[1:])}" for item in known]
        assert "A model says" in table and f"Target item: {positive}" in example
    assert "viu.parquet" in page.text  # written for another state: named, not shown


def test_images_are_made_anew_small_and_broken_ones_are_said(full: Path) -> None:
    page = Page(full)
    images = [given for tag, given in page.tags if tag == "img"]
    assert images and all(given["alt"] for given in images)
    for source in {given["src"] for given in images}:
        kind, data = source.split(",")
        assert kind == "data:image/jpeg;base64"
        image = Image.open(io.BytesIO(b64decode(data)))
        assert image.format == "JPEG" and max(image.size) == 96 and not image.getexif()
    assert "image not readable" in page.text and "no image" in page.text


def test_every_piece_names_its_files_with_their_hashes(full: Path, world: World) -> None:
    pieces = json.loads((full.parent / "sources.json").read_text())
    page = Page(full)
    anchors = {given.get("id") for _, given in page.tags}
    assert {piece["id"] for piece in pieces} <= anchors
    assert {f"{path.stem}" for path in (full.parent / "figures").iterdir()} == {
        piece["id"] for piece in pieces if piece["kind"] == "Figure"
    }
    for piece in pieces:
        assert piece["sources"]
        for source in piece["sources"]:
            assert hashlib.sha256(Path(source["file"]).read_bytes()).hexdigest() == source["sha256"]
            assert source["sha256"] in page.source
    named = {source["file"] for piece in pieces for source in piece["sources"]}
    assert {str(world.candidates), str(world.instructions / "test.parquet")} <= named


def test_two_runs_write_the_same_bytes_but_for_the_time(world: World) -> None:
    files = world.scores("good", 3.0), world.scores("fair", 1.0, seed=1), world.run()
    pages = []
    for _ in range(2):
        page = world.report(*files, out="again", dataset=world.dataset, instructions=world.instructions)
        pages.append(re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z", "TIME", page.read_text()))
        pages[-1] += "".join(path.read_text() for path in sorted((page.parent / "figures").iterdir()))
        time.sleep(1.1)
    assert pages[0] == pages[1]


def test_hostile_texts_stay_text(hostile: Path) -> None:
    page = Page(hostile)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {
        "script",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "foreignobject",
        "video",
        "audio",
    }
    for tag, given in page.tags:
        assert not any(name.startswith("on") for name in given), (tag, given)
        for name in ("src", "href", "xlink:href"):
            assert (given.get(name) or "#").startswith(("#", "data:")), (tag, given)
    assert page.source.count("<style") == 1 + page.source.count("<svg")  # matplotlib's own, one a figure
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200e\u200f]", page.source)
    assert "<script>alert(1)</script>" in page.text and r"$\frac{1}{2$ \input{x}" in page.text
    assert "x" * 400 not in page.source and "\u0300" * 5 not in page.source
    svg = "".join(path.read_text() for path in (hostile.parent / "figures").iterdir())
    assert r"$\frac{1}{2$" in svg and "&lt;script" in svg and "<script" not in svg
    assert "_hidden" in page.text


def test_cleaning_bounds_and_neutralizes() -> None:
    assert clean("a\u202eb\x07c\nd\te") == f"a{REPLACEMENT}b{REPLACEMENT}c d e"
    assert clean("پایه\u200cها 👩\u200d🔬") == "پایه\u200cها 👩\u200d🔬"
    assert len(clean("y" * 10_000)) == 300 and clean("y" * 10_000).endswith("…")
    assert clean("e" + "\u0301" * 50) == "e" + "\u0301" * 4
    assert clean("\ud800\ufffe\ue000") == REPLACEMENT * 3
    short = names(["z" * 100, "z" * 200, "z" * 300, "a"])
    assert len(set(short)) == 4 and all(len(name) <= 60 for name in short)


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        (
            "loo/1+20-uniform-seed42",
            ["last interaction of each user", "among 20 items", "uniformly", "seed 42"],
        ),
        ("loo/1+99-popularity-seed7/valid", ["in proportion to their popularity", "validation targets"]),
        (
            "users-8:1:1-seed42-warm/full/mask-train",
            ["share of the users", "8:1:1", "left out", "whole catalog"],
        ),
        ("ratio-time-8:1:1/full/no-mask", ["in order of time", "included"]),
        (
            "cold-items-8:1:1-seed42/full/mask-seen/cold-0123",
            ["knows none of", "8:1:1", "without a training interaction"],
        ),
        ("candidates-0123456789ab", ["names no protocol"]),
    ],
)
def test_protocols_are_said_in_words(protocol: str, words: list[str]) -> None:
    assert all(word in explain(protocol) for word in words), explain(protocol)


def test_training_shows_the_chosen_step_and_what_was_trained(full: Path) -> None:
    page = Page(full)
    assert "kept: step 40" in page.source and "0.7012" in page.text
    assert re.search(r"language model\s*1,000\s*100", page.text)


def test_training_shows_avl_where_a_run_has_it(world: World, full: Path) -> None:
    assert "vision-only" not in Page(full).text
    numbers = {"avl_loss_image": 6.5, "avl_loss_text": 6.25, "avl_gap": 1.3, "avl_reference": 1.2}
    numbers |= {"avl_k": 1.0125, "avl_k_min": 0.9, "avl_k_max": 1.4}
    lines = [{"step": step, "loss": 1 / step, **numbers} for step in range(1, 4)]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    page = Page(world.report(_good(world), world.run("avl", **{"log.jsonl": log}), out="avl"))
    for told in ("K of AVL", "mean 1.012 to 1.012", "vision-only 6.500", "of all steps 1.200"):
        assert told in page.source, told
    assert "texts 1" not in page.source  # of the two-sided form alone


def _good(world: World) -> Path:
    return world.scores("good", 3.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda w: w.report(w.run()), "no score file or rank records"),
        (lambda w: w.report(_good(w), candidates=None), "--candidates"),
        (lambda w: w.report(_good(w), part="valid"), "--part test"),
        (lambda w: w.report(_good(w), ablation=("image",)), "expected name=file"),
        (lambda w: w.report(_good(w), ablation=(f"a={_good(w)}",)), "name two or more"),
        (lambda w: w.report(_good(w), ablation=(f"a={_good(w)}", f"a={_good(w)}")), "named twice"),
        (lambda w: w.report(_good(w), examples=-1), "--examples"),
        (lambda w: w.report(_good(w), instructions=w.instructions), "--dataset"),
        (lambda w: w.report(_good(w), w.dataset), "is not a run folder"),
        (lambda w: w.report(_good(w), w.run("bad", **{"log.jsonl": '{"step": 1}\n{oops\n'})), "line 2"),
        (lambda w: w.report(_good(w), w.root / "scores"), "manifest.json is missing"),
    ],
)
def test_what_a_user_can_mend_is_said_and_nothing_is_written(world: World, make, said: str) -> None:
    shutil.rmtree(world.root / "out", ignore_errors=True)
    with pytest.raises(DataError, match=re.escape(said)):
        make(world)
    assert not (world.root / "out").exists()


def test_probabilities_out_of_range_are_named_by_file_and_row(world: World) -> None:
    path = world.scores("wrong", 1.0)
    frame = pl.read_parquet(path).with_columns(probability=pl.col("score") * 100)
    frame.write_parquet(path, metadata={"recllm.protocol": PROTOCOL, "recllm.system": "wrong"})
    with pytest.raises(DataError, match=r"wrong\.parquet: user 'u\d+'.*probability.*expected 0 to 1"):
        world.report(path)


def test_another_dataset_is_refused(world: World, tmp_path: Path) -> None:
    other = make_world(tmp_path, user_ids={0: "somebody"})
    with pytest.raises(DataError, match="--dataset"):
        world.report(world.scores("good", 3.0), candidates=world.candidates, dataset=other.dataset)


def test_an_existing_folder_is_kept_without_overwrite(world: World, tmp_path: Path) -> None:
    options = ReportOptions(
        (world.scores("good", 3.0),), candidates=world.candidates, resamples=50, out=tmp_path / "r"
    )
    page = report(options)
    before = page.read_bytes()
    with pytest.raises(DataError, match="--overwrite"):
        report(options)
    assert page.read_bytes() == before


def test_the_command_line_reads_its_options() -> None:
    argv = [
        "a.parquet",
        "runs/x",
        "--candidates",
        "c.parquet",
        "--ablation",
        "image=a",
        "text=b",
        "--ks",
        "1",
        "10",
    ]
    options = parse_config(ReportOptions, argv)
    assert options.files == (Path("a.parquet"), Path("runs/x")) and options.ablation == ("image=a", "text=b")
    assert options.ks == (1, 10) and options.examples == 6


def test_many_users_take_seconds_and_the_page_stays_small(tmp_path: Path) -> None:
    users, rng = 25_000, np.random.default_rng(0)
    target = rng.integers(0, 21, users)
    rows = pl.DataFrame(
        {
            "user": np.repeat(np.arange(users), 21),
            "item": np.tile(np.arange(21), users),
            "target": np.repeat(target, 21),
        }
    ).with_columns(label=(pl.col("item") == pl.col("target")).cast(pl.Int8))
    rows.write_parquet(tmp_path / "candidates.parquet", metadata={"recllm.protocol": PROTOCOL})
    files = []
    for place in range(3):
        margin = rng.normal(size=rows.height) + (2 - place) * rows["label"].to_numpy()
        files.append(tmp_path / f"s{place}.parquet")
        scored = rows.drop("label").with_columns(score=margin, probability=1 / (1 + np.exp(-margin)))
        scored.write_parquet(files[-1], metadata={"recllm.protocol": PROTOCOL})
    begun = time.perf_counter()
    options = ReportOptions(
        tuple(files), candidates=tmp_path / "candidates.parquet", resamples=500, out=tmp_path / "r"
    )
    page = report(options)
    assert time.perf_counter() - begun < 60
    assert page.stat().st_size < 2_000_000

"""Published figures keep their protocol, and the README compares only like with like."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from recllm.rankers import RANKERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTENT = json.loads((ROOT / "results" / "published.json").read_text(encoding="utf-8"))
TABLES = CONTENT["tables"]
CELL = re.compile(r"([\d.]+) / ([\d.]+) \((.+)\)")


@pytest.fixture
def ranker_tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("ranker_tables")


def readme_table(name: str) -> tuple[list[list[str]], str]:
    """Returns the rows of a generated table, and the caption under it."""
    text = re.search(rf"<!-- table:{name} -->\n(.*?)<!-- end -->", README, re.DOTALL)[1]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]], text.rpartition("|\n")[2].strip()


@pytest.mark.parametrize("each", TABLES, ids=lambda each: each["id"])
def test_every_published_table_says_its_protocol(each):
    assert each["dataset"] in CONTENT["datasets"]
    assert each["source"] and each["split"]
    assert each["masked"] in {"seen", "train", "none", "not applicable", None}
    assert {"loss", "candidates", "counts", "url"} <= set(each)
    for name, row in each["rows"].items():
        assert len(row) == len(each["metrics"]), name
        assert all(value is None or 0 < value < 1 for value in row), name
    for error in each["errors"]:
        assert error["row"] in each["rows"] and error["note"]
        assert len(error["right"]) == len(error["metrics"]) and set(error["metrics"]) <= set(each["metrics"])


def test_published_tables_have_names_of_their_own():
    names = [each["id"] for each in TABLES]
    assert len(set(names)) == len(names) >= 30


@pytest.mark.parametrize(
    ("name", "dataset"), [("rankers_beauty", "beauty"), ("rankers_baby", "baby")], ids=["beauty", "baby"]
)
def test_a_published_figure_stands_only_beside_a_measured_one_of_the_same_mask(name, dataset):
    (head, *rows), _ = readme_table(name)
    of_head = {"masked": "seen", "unmasked": "none"} if dataset == "beauty" else {"": "train"}
    compared = 0
    for place, title in enumerate(head):
        if not title.startswith("published"):
            continue
        kind = title.partition(", ")[2]
        if kind == "protocol not stated":
            mask = None
        else:  # the two columns before are ours, under the same mask
            mask = of_head[kind]
            assert [each.partition(", ")[2] for each in head[place - 2 : place]] == [kind, kind]
        for row in rows:
            if not row[place]:
                continue
            first, second, source = CELL.fullmatch(row[place]).groups()
            (found,) = (each for each in TABLES if each["source"] == source and each["dataset"] == dataset)
            assert found["masked"] == mask, row
            values = [value for each in found["rows"].values() for value in each]
            assert float(first) in values and float(second) in values
            compared += 1
    assert compared >= 2


def test_the_best_figure_of_the_same_mask_is_taken(ranker_tables):
    metrics = ("recall@10", "ndcg@10")
    bare = ranker_tables.published("beauty", "sasrec", metrics, "none")
    assert bare.values == (0.0842, 0.0421) and bare.source.startswith("RecBole log")
    assert ranker_tables.published("beauty", "gru4rec", metrics, "none").values == (0.0623, 0.0342)
    assert ranker_tables.published("beauty", "bert4rec", metrics, "none").values == (0.0404, 0.0211)
    assert ranker_tables.published("beauty", "sasrec", metrics, "seen") is None
    assert ranker_tables.published("beauty", "m3srec", metrics, None) is None  # REVEAL's is another model


def test_a_copying_error_counts_with_its_right_value(ranker_tables, monkeypatch):
    wrong = {
        "dataset": "d",
        "source": "s",
        "masked": "train",
        "metrics": ["recall@20", "ndcg@20"],
        "rows": {"BPR": [0.9, 0.5]},
        "errors": [{"row": "BPR", "metrics": ["recall@20"], "right": [0.4], "note": "another row's"}],
    }
    monkeypatch.setattr(ranker_tables, "results", lambda name: {"tables": [wrong]})
    assert ranker_tables.published("d", "bpr", ("recall@20", "ndcg@20"), "train").values == (0.4, 0.5)


def test_the_readme_says_how_sasrec_compares_with_recbole(ranker_tables):
    _, caption = readme_table("rankers_beauty")
    assert re.search(
        r"`sasrec` is about equal to the published figure, unmasked: [\d./ ]+ against 0.0842 / 0.0421",
        caption,
    )
    found = ranker_tables.Published((0.10, 0.05), "a paper", "none")
    assert ranker_tables.compared([0.101, 0.0505], found).startswith("about equal to")
    assert ranker_tables.compared([0.2, 0.1], found).startswith("above")
    assert ranker_tables.compared([0.09, 0.04], found).startswith("below")
    assert ranker_tables.compared([0.2, 0.04], found).startswith("in one metric above and in one below")


@pytest.mark.parametrize("world", ["beauty", "baby", "movielens"])
def test_every_result_says_whether_it_was_tuned_and_the_caption_repeats_it(world, ranker_tables):
    figures = json.loads((ROOT / "results" / f"rankers_{world}.json").read_text())["figures"]
    trained = {ranker: line for ranker, line in figures.items() if ranker != "popularity"}
    (_, *rows), caption = readme_table(f"rankers_{world}")
    tuned = [ranker for ranker, line in trained.items() if line["tuned"]]
    for ranker in tuned:
        assert trained[ranker]["tuned_options"] in caption
    assert caption.startswith(f"{len(tuned) or 'None'} of the {len(trained)} rankers ")
    for line in trained.values():
        assert ("--image" in line.get("flags", [])) == ("images" in line)
        assert line.get("images", "") in caption
    order = [re.match(r"`(\w+)", row[0])[1] for row in rows]
    assert sorted(order, key=list(ranker_tables.NAMES).index) == order  # by family, not by figure


def test_rankers_are_in_the_order_of_the_readmes_families(ranker_tables):
    assert set(ranker_tables.NAMES) == {*RANKERS, "popularity"}
    families_table = README.partition("| ranker | paper |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| (`.+?`) \|", families_table, re.MULTILINE)
    families = [name for line in named for name in re.findall(r"`(\w+)`", line)]
    assert families == [name for name in ranker_tables.NAMES if name != "popularity"]

"""Metrics by popularity: buckets by their definition, and each the metric of its own targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.cli import main
from recllm.data.candidates import full_ranking
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.errors import DataError
from recllm.evaluation import RankRecords, rank_catalog
from recllm.evaluation.commands import RankReportConfig, rank_report
from recllm.evaluation.popularity import NAMES, Buckets
from recllm.rankers.commands import PopularityOptions, popularity
from tests.conftest import make_dataset


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_buckets_cut_training_interactions_in_thirds(counts):
    counts = np.array(counts)
    buckets = Buckets.of(counts)
    for item, count in enumerate(counts):
        more = counts[counts > count].sum()  # of more popular items: equal items are never parted
        expected = (
            0 if count == 0 else 3 if 3 * more < counts.sum() else 2 if 3 * more < 2 * counts.sum() else 1
        )
        assert buckets.of_item[item] == expected
    for bucket in range(4):
        inside = counts[buckets.of_item == bucket]
        assert buckets.items[bucket] == len(inside) and buckets.least[bucket] == min(inside, default=0)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    dataset = make_dataset(tmp_path_factory.mktemp("popularity") / "d")
    return make_split(dataset, SplitOptions(dataset.folder, "random", ratios=(2, 1, 1)))


def test_each_bucket_has_the_metric_of_its_own_targets(split, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ranking = full_ranking(split, "test")
    scores = np.random.default_rng(0).normal(size=(len(ranking.users), 40))
    made = {"data_hash": split.dataset.data_hash, "split_hash": split.split_hash}
    rank_catalog(ranking, scores, system="chance", made=made).save(Path("chance.parquet"))
    files = [str(popularity(PopularityOptions(split.folder))), "chance.parquet"]
    main(["eval", "ranks", *files, "--ks", "3", "--by-popularity", str(split.folder), "--out", "out"])
    out = capsys.readouterr().out
    assert out.index("by popularity") < out.index("head (")
    table = json.loads(Path("out/by_popularity.json").read_text())
    figures = {(row["bucket"], row["system"], row["metric"]): row for row in table["figures"]}
    counts = np.bincount(split.dataset.item_codes[split.rows("train")], minlength=40)
    of_item = Buckets.of(counts).of_item
    total = 0
    for number, name in enumerate(NAMES):
        if (name, "chance", "hr@3") not in figures:
            assert not (of_item[ranking.positives] == number).any()
            continue
        hits = []
        for row in range(len(ranking.users)):
            own = ranking.positives[ranking.positive_offsets[row] : ranking.positive_offsets[row + 1]]
            masked = ranking.masked[ranking.masked_offsets[row] : ranking.masked_offsets[row + 1]]
            inside = own[of_item[own] == number]
            total += len(inside)
            if len(inside):
                order = np.argsort(-np.where(np.isin(np.arange(40), masked), -9, scores[row]))
                hits.append(bool(set(order[:3]) & set(inside)))
        figure = figures[name, "chance", "hr@3"]
        assert (
            figure["value"] == pytest.approx(np.mean(hits))
            and figure["low"] <= figure["value"] <= figure["high"]
        )
    assert total == len(ranking.positives)
    popular = [figures[name, "popularity", "hr@3"]["value"] for name in ("head", "tail")]
    assert popular[0] > popular[1]


def test_systems_of_another_split_are_refused(split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = popularity(PopularityOptions(split.folder))
    other = make_split(split.dataset, SplitOptions(split.dataset.folder, "random", seed=9, name="other"))
    with pytest.raises(
        DataError, match=r"was made from another split than .*give the split that the systems"
    ):
        rank_report(RankReportConfig((path,), by_popularity=other.folder))
    records = RankRecords.load(path)
    RankRecords(records.user, records.item + "x", records.above, records.tied, records.n, "user").save(
        Path("strange.parquet")
    )
    with pytest.raises(DataError, match="is no item of the split's dataset"):
        rank_report(RankReportConfig((Path("strange.parquet"),), by_popularity=split.folder))

"""Systems that lack content for some items: covering less gains nothing, and is said wherever it is seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.data.candidate_files import Candidates, read_candidates
from recllm.data.candidates import CandidateOptions, full_ranking, make_candidates
from recllm.data.dataset import write_dataset
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.errors import DataError
from recllm.evaluation import RankRecords, compute_metrics
from recllm.evaluation.commands import CompareRunsConfig, RankReportConfig, compare_runs, rank_report
from recllm.evaluation.coverage import Coverage, fill_lists
from recllm.evaluation.inputs import read_system
from recllm.evaluation.score_files import ScoreFiles
from recllm.rankers.commands import PopularityOptions, popularity
from recllm.retrieval.profiles import MeanProfiles

USERS, ITEMS, POPULAR = 600, 300, 30
NAME = "1+20-uniform-seed42"


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """600 users who take six items each; the first 30 of 300 items have about half of all interactions."""
    rng = np.random.default_rng(1)
    weights = np.where(np.arange(ITEMS) < POPULAR, 0.5 / POPULAR, 0.5 / (ITEMS - POPULAR))
    log = [
        (f"u{user:03d}", f"i{item:03d}", time)
        for user in range(USERS)
        for time, item in enumerate(rng.choice(ITEMS, 6, replace=False, p=weights))
    ]
    dataset = write_dataset(
        tmp_path_factory.mktemp("coverage") / "shop",
        items=pl.DataFrame({"item": [f"i{item:03d}" for item in range(ITEMS)]}),
        interactions=pl.DataFrame(log, schema=["user", "item", "timestamp"], orient="row"),
        users=pl.DataFrame({"user": [f"u{user:03d}" for user in range(USERS)]}),
        source={"made": "by a test"},
    )
    split = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    make_candidates(split, CandidateOptions(split.folder))
    return split


def few() -> np.ndarray:
    return np.arange(ITEMS) < POPULAR


def score(split: Split, out: Path, present: np.ndarray, *, pool="all", lists=False, name="texts") -> Path:
    """Writes what `score profile` writes, from vectors that mean nothing."""
    vectors = np.random.default_rng(5).normal(size=(ITEMS, 16)).astype(np.float32)
    model = MeanProfiles(split, "test", vectors * present[:, None], present)
    options = PopularityOptions(split.folder, candidates=NAME if lists else "full", out=out, overwrite=True)
    files = ScoreFiles(options, name)
    if lists:
        candidates = read_candidates(split, NAME, "test")
        return files.write_scores(candidates, model.score, split, present=present, pool=pool)
    ranking = full_ranking(split, "test")
    return files.write_ranks(
        ranking, lambda users: (model.of_users(users), model.item_vectors), split, present=present, pool=pool
    )


def measured(split: Split, path: Path, metric: str) -> float:
    lists = "scores" in path.parts
    candidates = read_candidates(split, NAME, "test") if lists else None
    return compute_metrics(read_system(path, candidates).records, names=[metric]).mean()[metric]


@pytest.mark.parametrize("lists", [False, True])
def test_meaningless_texts_gain_nothing_by_covering_popular_items_alone(split, tmp_path, lists):
    metric, chance = ("hr@5", 5 / 21) if lists else ("hr@10", 10 / 295)  # five known items are masked
    error = np.sqrt(chance * (1 - chance) / USERS)
    everything = score(split, tmp_path / "whole", np.ones(ITEMS, bool), lists=lists)
    shrunk = score(split, tmp_path / "few", few(), lists=lists)
    assert abs(measured(split, everything, metric) - chance) < 4 * error
    assert abs(measured(split, shrunk, metric) - chance) < 4 * error  # ranked last: 5 times as much
    assert abs(measured(split, shrunk, "auc") - 0.5) < 0.06


def test_texts_that_mean_something_keep_their_rank_among_the_covered(split, tmp_path):
    """A covered item at rank r of c covered candidates has about the rank r n / c of all n."""
    present, ranking = few(), full_ranking(split, "test")
    scores = np.random.default_rng(0).normal(size=(len(ranking.users), ITEMS))
    files = ScoreFiles(PopularityOptions(split.folder, out=tmp_path), "known")
    path = files.write_ranks(ranking, lambda _: scores, split, present=present)
    records = RankRecords.load(path)
    for place, target in enumerate(ranking.positives):  # one target each
        masked = ranking.masked[ranking.masked_offsets[place] : ranking.masked_offsets[place + 1]]
        kept = present.copy()
        kept[masked] = False
        if not present[target]:
            continue
        above, ratio = (scores[place, kept] > scores[place, target]).sum(), records.n[place] / kept.sum()
        assert abs(records.above[place] - above * ratio) <= above + 1
        assert abs(records.tied[place] - ratio) <= 2


def test_the_covered_pool_has_covered_candidates_and_targets_alone(split, tmp_path):
    full = RankRecords.load(score(split, tmp_path, few(), pool="covered"))
    known = {f"i{item:03d}" for item in range(POPULAR)}
    assert set(full.item) <= known and 200 < len(full) < 400
    assert full.n.max() <= POPULAR
    coverage = Coverage.of_made(full.made)
    assert (coverage.pool, coverage.items, coverage.of_items) == ("covered", POPULAR, ITEMS)
    assert (coverage.targets, coverage.of_targets) == (len(full), USERS)
    assert full.protocol == f"loo/full/mask-seen/covered-{coverage.fingerprint[:8]}"
    path = score(split, tmp_path, few(), pool="covered", lists=True)
    candidates = read_candidates(split, NAME, "test")
    system = read_system(path, candidates)
    assert len(system.records) == len(full) and set(system.candidates.frame["item"]) <= known
    assert system.records.protocol == f"loo/{NAME}/covered-{coverage.fingerprint[:8]}"
    scores = pl.read_parquet(path)
    metadata = {key: text for key, text in pl.read_parquet_metadata(path).items() if key.startswith("recllm")}
    scores[1:].write_parquet(path, metadata=metadata)  # a row that was left out is missed
    with pytest.raises(DataError, match=r"1 of .* candidates have no score"):
        read_system(path, candidates)


def test_unequal_coverage_is_said_and_not_compared_unasked(split, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ranks = [score(split, tmp_path, few(), name="few"), popularity(PopularityOptions(split.folder))]
    half = score(split, tmp_path, np.arange(ITEMS) % 2 == 0, name="half")
    table = rank_report(RankReportConfig((*ranks, half), ks=(10,), resamples=50, out=tmp_path / "out"))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["covered items"] == [f"{POPULAR}/{ITEMS}", "all", f"150/{ITEMS}"]
    assert rows["covered targets"][1] == "all" and rows["covered targets"][0].endswith(f"/{USERS}")
    assert any(note.startswith("Unequal coverage: ") for note in table.notes)
    facts = json.loads((tmp_path / "out" / "metrics.json").read_text())["systems"]
    assert facts["few"]["coverage"]["items"] == POPULAR and facts["popularity"]["coverage"] is None
    for pair in (ranks, [ranks[0], half]):
        with pytest.raises(DataError, match=r"Unequal coverage: .*--unequal-coverage"):
            compare_runs(CompareRunsConfig(tuple(pair), resamples=50))
        asked = compare_runs(CompareRunsConfig(tuple(pair), resamples=50, unequal_coverage=True))
        assert any(note.startswith("Unequal coverage: ") for note in asked.notes)
    whole = score(split, tmp_path, np.ones(ITEMS, bool), name="whole")
    equal = compare_runs(CompareRunsConfig((ranks[1], whole), resamples=50))
    assert not any("coverage" in note for note in equal.notes)
    covered = score(split, tmp_path, few(), pool="covered", name="covered")
    with pytest.raises(DataError, match="systems can be compared under one protocol only"):
        rank_report(RankReportConfig((ranks[0], covered)))
    assert "content for 30 of 300 items" in capsys.readouterr().out


def test_rows_without_content_stand_in_equally_and_in_their_own_list():
    frame = pl.DataFrame(
        {
            "user": ["u"] * 7 + ["v"] * 3,
            "item": [*"abcdefg", *"abc"],
            "score": [3.0, 1, 2, 0, 0, 0, 0, 5, 6, 7],
        }
    )
    filled = fill_lists(frame, pl.Series([True] * 3 + [False] * 7))
    assert filled["score"][:3].to_list() == [3, 1, 2]
    counts = filled[:7]["score"].value_counts()["count"]
    assert sorted(counts) == [2, 2, 3]
    assert filled["score"][7:].to_list() == [0, 0, 0]  # nothing is known in this list: a tie
    assert fill_lists(frame, pl.Series([True] * 10)).equals(frame)


def test_scores_ranks_and_lists_of_another_split_do_not_meet(split, tmp_path):
    """Equal names and lists, but a training part that is not the same."""
    path = score(split, tmp_path, np.ones(ITEMS, bool), lists=True)
    metadata = {key: text for key, text in pl.read_parquet_metadata(path).items() if key.startswith("recllm")}
    made = json.loads(metadata["recllm.made"])
    assert made["split_hash"] == split.split_hash and made["run"]["command"] and made["run"]["recllm"]
    candidates = Candidates.read(split.folder / "candidates" / NAME / "test.parquet")
    ours = read_system(path, candidates)
    assert ours.records.made["split_hash"] == split.split_hash
    ours.records.save(tmp_path / "ours.parquet")
    for key, other, said in (
        ("split_hash", "b" * 64, "was made from another split than"),
        ("data_hash", "b" * 64, "was made from another state of the dataset than"),
    ):
        changed = {**metadata, "recllm.made": json.dumps({**made, key: other})}
        pl.read_parquet(path).write_parquet(tmp_path / "theirs.parquet", metadata=changed)
        with pytest.raises(DataError, match=rf"theirs\.parquet {said} .*score the rows of that file"):
            read_system(tmp_path / "theirs.parquet", candidates)
        changed = {**ours.records.made, key: other}
        records = RankRecords.load(tmp_path / "ours.parquet")
        object.__setattr__(records, "made", changed)
        records.save(tmp_path / "ranks.parquet")
        with pytest.raises(DataError, match=rf"ranks\.parquet {said} .*ours\.parquet"):
            rank_report(RankReportConfig((tmp_path / "ours.parquet", tmp_path / "ranks.parquet")))
        with pytest.raises(DataError, match=rf"ranks\.parquet {said} .*test\.parquet"):
            read_system(tmp_path / "ranks.parquet", candidates)
    changed = {**metadata, "recllm.candidates": "0" * 16}
    pl.read_parquet(path).write_parquet(tmp_path / "theirs.parquet", metadata=changed)
    with pytest.raises(DataError, match="was made from another set of candidate lists than"):
        read_system(tmp_path / "theirs.parquet", candidates)


def test_systems_that_need_no_content_are_ranked_in_the_same_pool(split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("few.npy", np.ones((POPULAR, 2), np.float32))
    Path("few.items.txt").write_text("".join(f"i{item:03d}\n" for item in range(POPULAR)))
    for lists in (False, True):
        texts = score(split, tmp_path, few(), pool="covered", lists=lists)
        options = {"candidates": NAME if lists else "full", "pool": "covered", "covered_by": ("few.npy",)}
        popular = popularity(PopularityOptions(split.folder, **options))
        candidates = split.folder / "candidates" / NAME / "test.parquet" if lists else None
        config = RankReportConfig((texts, popular), ks=(10,), resamples=50, candidates=candidates)
        table = rank_report(config)  # one protocol, the same targets
        assert not any("coverage" in note for note in table.notes)
        rows = {row[0]: row[1:] for row in table.rows}
        assert rows["covered items"] == [f"{POPULAR}/{ITEMS}"] * 2 and len(set(rows["positives"])) == 1
    records = RankRecords.load(
        popularity(PopularityOptions(split.folder, overwrite=True, **{**options, "candidates": "full"}))
    )
    counts = np.bincount(split.dataset.item_codes[split.rows("train")], minlength=ITEMS)
    for item, user, above, n in zip(records.item, records.user, records.above, records.n, strict=True):
        known = set(
            split.dataset.item_codes[split.history_rows("test")][
                split.dataset.user_codes[split.history_rows("test")] == int(user[1:])
            ]
        )
        target = int(item[1:])
        pool = [each for each in range(POPULAR) if each not in known or each == target]
        assert n == len(pool) and above == sum(counts[each] > counts[target] for each in pool)


def test_a_pool_that_is_not_said_or_lacks_content_is_refused(split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="say which texts or vectors make the pool by --covered-by"):
        popularity(PopularityOptions(split.folder, pool="covered"))
    with pytest.raises(DataError, match="--pool is all"):
        np.save("few.npy", np.ones((POPULAR, 2), np.float32))
        Path("few.items.txt").write_text("".join(f"i{item:03d}\n" for item in range(POPULAR)))
        popularity(PopularityOptions(split.folder, covered_by=("few.npy",)))
    with pytest.raises(
        DataError, match=r"no content for 1 of the 31 items of the pool \(the first is 'i030'\)"
    ):
        Coverage.of(few(), split.dataset.items["item"], np.array([1]), "covered", np.arange(ITEMS) <= POPULAR)
    assert not Path("ranks").exists() and not Path("scores").exists()


def test_the_cold_pool_holds_items_without_a_training_interaction_alone(split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cold = make_split(split.dataset, SplitOptions(split.dataset.folder, "cold-items", overwrite=True))
    make_candidates(cold, CandidateOptions(cold.folder, overwrite=True))
    trained = set(cold.scan("train").collect()["item"])
    pool = [item for item in split.dataset.items["item"] if item not in trained]
    assert len(pool) == ITEMS // 5
    records = RankRecords.load(score(cold, tmp_path, np.ones(ITEMS, bool), pool="cold"))
    assert "/cold-" in records.protocol and set(records.item) <= set(pool) and records.n.max() <= len(pool)
    assert len(records) == len(pl.read_parquet(cold.folder / "test.parquet").unique(["user", "item"]))
    # An item of the pool without content ranks as one with content, within the pool.
    half = np.arange(ITEMS) % 2 == 0
    partly = RankRecords.load(score(cold, tmp_path, half, pool="cold"))
    assert partly.protocol == records.protocol and np.array_equal(partly.n, records.n)
    coverage = Coverage.of_made(partly.made)
    assert (coverage.items, coverage.of_items) == (sum(half[int(item[1:])] for item in pool), len(pool))
    path = score(cold, tmp_path, np.ones(ITEMS, bool), pool="cold", lists=True)
    system = read_system(path, read_candidates(cold, NAME, "test"))
    assert set(system.candidates.frame["item"]) <= set(pool)
    with pytest.raises(DataError, match="scores all candidates alike"):
        popularity(PopularityOptions(cold.folder, pool="cold"))  # it knows nothing of any of them
    with pytest.raises(DataError, match="--top-k lists the best of the whole catalog"):
        popularity(PopularityOptions(cold.folder, pool="cold", top_k=3))

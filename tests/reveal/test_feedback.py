"""Feedback from validation lists: the numbers, the priority, and that nothing else is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from recllm.cli import main
from recllm.data.candidates import full_ranking
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.evaluation.ranks import RankRecords
from recllm.evaluation.top_k_files import TopK
from recllm.reveal.feedback import (
    Feedback,
    ImageFeedbackOptions,
    build_feedback,
    divide_users,
    priorities,
    statistics,
)
from tests.reveal.worlds import USERS, write_lists, write_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("feedback")
    split = write_shop(folder / "shop")
    for part in ("valid", "test"):
        write_lists(split, folder / part, part)
    return SimpleNamespace(
        folder=folder, split=split, lists=folder / "valid/topk.parquet", ranks=folder / "valid/ranks.parquet"
    )


def build(shop: SimpleNamespace, out: Path, **options: object) -> Feedback:
    given = {"lists": shop.lists, "ranks": shop.ranks, **options}
    return Feedback.read(
        build_feedback(ImageFeedbackOptions(shop.split.folder, out=out, **given)), shop.split.dataset
    )


def by_hand(shop: SimpleNamespace, users: set[str]) -> dict[str, dict]:
    """The statistics in plain loops over the lists of some users."""
    lists: dict[str, list[str]] = {}
    for user, target, item in TopK.read(shop.lists).frame.select("user", "target", "item").iter_rows():
        if user in users:
            lists.setdefault((user, target), []).append(item)
    records = RankRecords.load(shop.ranks)
    found = {}
    for item in shop.split.dataset.items["item"]:
        expected = [
            records.above[row] + (records.tied[row] + 1) / 2
            for row in range(len(records))
            if records.item[row] == item and records.user[row] in users
        ]
        hits = [row.index(item) + 1 for (_, target), row in lists.items() if target == item and item in row]
        wrong = [
            row.index(item) + 1 for (_, target), row in lists.items() if target != item and item in row[:10]
        ]
        rivals = Counter(
            other
            for (_, target), row in lists.items()
            if target == item
            for other in (row[: row.index(item)] if item in row else row)[:10]
        )
        wanted = Counter(target for (_, target), row in lists.items() if target != item and item in row[:10])
        found[item] = {
            "targets": len(expected),
            "mean_rank": np.mean(expected) if expected else None,
            "hits": len(hits),
            "rank_when_hit": np.mean(hits) if hits else None,
            "top10": np.mean(np.array(hits) <= 10) if hits else None,
            "top20": np.mean(np.array(hits) <= 20) if hits else None,
            "wrong": len(wrong),
            "wrong_rank": np.mean(wrong) if wrong else None,
            "exposures": sum(item in row for row in lists.values()),
            "rivals": [name for name, _ in sorted(rivals.items(), key=lambda pair: (-pair[1], pair[0]))][:3],
            "wanted": [name for name, _ in sorted(wanted.items(), key=lambda pair: (-pair[1], pair[0]))][:3],
        }
    return found


def test_the_numbers_are_those_of_plain_loops_over_the_named_users(shop, tmp_path):
    everyone = {f"u{number:02d}" for number in range(USERS)}
    half = {f"u{number:02d}" for number in range(0, USERS, 2)}
    pl.DataFrame({"user": sorted(half)}).write_parquet(tmp_path / "half.parquet")
    for users, options in ((everyone, {}), (half, {"users": tmp_path / "half.parquet"})):
        feedback = build(shop, tmp_path / f"{len(users)}.parquet", **options)
        assert feedback.made["users"] == len(users) and feedback.made["part"] == "valid"
        expected = by_hand(shop, users)
        assert feedback.frame["id"].to_list() == list(expected)
        for row in feedback.frame.iter_rows(named=True):
            for name, value in expected[row["id"]].items():
                assert row[name] == (value if not isinstance(value, float) else pytest.approx(value)), name
    assert sum(row["hits"] for row in expected.values()) > 3
    assert sum(row["wrong"] for row in expected.values()) > 50


def test_priorities_are_the_formula_of_the_release(shop, tmp_path):
    frame = build(shop, tmp_path / "f.parquet").frame
    hit_ranks = [row["rank_when_hit"] for row in frame.iter_rows(named=True) if row["hits"]]
    pos, neg = [], []
    for row in frame.iter_rows(named=True):
        pos.append(0.0)
        if row["hits"]:
            share = (
                row["rank_when_hit"] / max(hit_ranks) + 0.5 * (1 - row["top10"]) + 0.5 * (1 - row["top20"])
            )
            pos[-1] = np.log(1 + row["hits"]) * share
        danger = min(max((11 - row["wrong_rank"]) / 10, 0), 1) if row["wrong"] else 0
        neg.append(np.log(1 + row["wrong"]) * (0.5 * danger + 0.5 * 1))
    expected = np.log(1 + frame["exposures"].to_numpy()) * (
        np.array(pos) / max(pos) + np.array(neg) / max(neg)
    )
    np.testing.assert_allclose(frame["priority"].to_numpy(), expected, rtol=1e-12)
    assert frame["kind"].to_list() == ["pos" if a >= b else "neg" for a, b in zip(pos, neg, strict=True)]
    assert frame["kind"].n_unique() == 2


def test_items_that_no_list_has_count_only_if_asked_for():
    items = pl.Series(["never", "often", "absent"])
    lists = pl.DataFrame({"user": ["a", "b"], "target": ["never", "often"], "item": ["often", "often"]})
    targets = pl.DataFrame({"user": ["a", "b"], "target": ["never", "often"], "expected": [9.0, 1.0]})
    table = statistics(items, lists, targets)
    plain = dict(zip(items, priorities(table)[2], strict=True))
    assert plain["never"] == 0 and plain["often"] > 0
    asked = dict(zip(items, priorities(table, never_retrieved=True)[2], strict=True))
    assert asked["never"] > 0 and asked["absent"] == 0
    nothing = statistics(items, lists.clear(), targets.clear())
    assert priorities(nothing)[2].to_list() == [0, 0, 0]


def test_halves_are_disjoint_seeded_and_blind_to_order():
    users = pl.Series([f"u{number}" for number in range(101)])
    critic, choosing = divide_users(users, 3)
    assert len(critic) == 50 and len(choosing) == 51
    assert set(critic) | set(choosing) == set(users) and not set(critic) & set(choosing)
    assert divide_users(users.reverse(), 3)[0].equals(critic)
    assert not divide_users(users, 4)[0].equals(critic)
    with pytest.raises(DataError, match="expected 2 or more"):
        divide_users(users[:1], 3)


def test_the_test_part_reaches_nothing(shop, tmp_path, monkeypatch):
    """Another test part changes no number; the file of test rows is not opened; test lists are refused."""
    other = write_shop(tmp_path / "other", test_shift=1)
    assert not other.dataset.interactions.equals(shop.split.dataset.interactions)
    ranking = full_ranking(other, "valid")
    assert np.array_equal(ranking.positives, full_ranking(shop.split, "valid").positives)
    write_lists(other, tmp_path / "lists")
    opened = []
    scan = Split.scan
    monkeypatch.setattr(
        Split, "scan", lambda self, part, **more: opened.append(part) or scan(self, part, **more)
    )
    files = SimpleNamespace(
        split=other, lists=tmp_path / "lists/topk.parquet", ranks=tmp_path / "lists/ranks.parquet"
    )
    assert build(files, tmp_path / "a.parquet").frame.equals(build(shop, tmp_path / "b.parquet").frame)
    assert set(opened) == {"train", "valid"}
    with pytest.raises(DataError, match="no full ranking of the valid part"):
        build(
            shop,
            tmp_path / "c.parquet",
            lists=shop.folder / "test/topk.parquet",
            ranks=shop.folder / "test/ranks.parquet",
        )
    assert not (tmp_path / "c.parquet").exists()


def test_what_does_not_belong_together_is_refused(shop, tmp_path):
    write_lists(shop.split, tmp_path / "short", k=10)
    with pytest.raises(DataError, match="lists of 10 items; expected 20 or more: score with --top-k 40"):
        build(
            shop,
            tmp_path / "x.parquet",
            lists=tmp_path / "short/topk.parquet",
            ranks=tmp_path / "short/ranks.parquet",
        )
    write_lists(shop.split, tmp_path / "named", system="another")
    with pytest.raises(DataError, match=r"system 'run' and .* has 'another'"):
        build(shop, tmp_path / "x.parquet", ranks=tmp_path / "named/ranks.parquet")
    pl.DataFrame({"user": ["nobody"]}).write_parquet(tmp_path / "nobody.parquet")
    with pytest.raises(DataError, match="user 'nobody' has no validation target"):
        build(shop, tmp_path / "x.parquet", users=tmp_path / "nobody.parquet")
    with pytest.raises(DataError, match="is no file of feedback"):
        Feedback.read(shop.lists, shop.split.dataset)


def test_the_command(shop, tmp_path, capsys):
    out = tmp_path / "f.parquet"
    flags = ["--lists", str(shop.lists), "--ranks", str(shop.ranks), "--out", str(out)]
    main(["build", "image-feedback", str(shop.split.folder), *flags])
    assert "24 users' validation lists" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["build", "image-feedback", str(shop.split.folder), *flags])
    assert "exists already" in capsys.readouterr().err

"""Rank records from score files, matrices and whole catalogs; what they refuse."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.data import candidates as data_candidates
from recllm.data.splits import SplitOptions, make_split
from recllm.errors import DataError
from recllm.evaluation import (
    RankRecords,
    full_ranking,
    rank_candidates,
    rank_catalog,
    rank_full,
    rank_score_matrix,
)
from recllm.evaluation.full_ranking import top_k
from recllm.evaluation.inputs import Candidates, read_system


def frame(records: RankRecords) -> pl.DataFrame:
    columns = {name: getattr(records, name) for name in ("user", "item", "above", "tied", "n")}
    return (
        pl.DataFrame(columns)
        .with_columns(pl.col("user", "item").cast(pl.String), pl.col("above", "tied", "n").cast(pl.Int64))
        .sort("user", "item", "above")
    )


def csr(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = [item for row in rows for item in row]
    return np.cumsum([0, *map(len, rows)]), np.array(flat, np.int64)


@st.composite
def worlds(draw):
    """Integer scores (many ties), positives (none, one, several) and seen items (repeats, overlaps)."""
    users, items = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, draw(st.integers(1, 6)), (users, items)).astype(np.float32)
    positives = [rng.permutation(items)[: rng.integers(0, items + 1)].tolist() for _ in range(users)]
    seen = [rng.integers(0, items, rng.integers(0, 2 * items)).tolist() for _ in range(users)]
    return scores, positives, seen


def as_tables(scores, positives, seen) -> tuple[pl.DataFrame, pl.DataFrame]:
    rows = [
        (u, i, int(i in positives[u]), float(scores[u, i]))
        for u in range(len(scores))
        for i in range(scores.shape[1])
        if positives[u] and (i in positives[u] or i not in seen[u])
    ]
    schema = {"user": pl.Int64, "item": pl.Int64, "label": pl.Int64, "score": pl.Float64}
    table = pl.DataFrame(rows, schema=schema, orient="row")
    return table.drop("score"), table.drop("label").sample(fraction=1, shuffle=True, seed=0)


@settings(max_examples=150, deadline=None)
@given(worlds(), st.integers(1, 7), st.integers(1, 3))
def test_full_ranking_equals_candidate_lists_in_every_form_block_and_thread(world, block, threads):
    scores, positives, seen = world
    wanted = frame(rank_candidates(*as_tables(scores, positives, seen)))
    n_items = scores.shape[1]
    forms = {
        "numpy": scores,
        "torch": torch.from_numpy(scores),
        "bfloat16": torch.from_numpy(scores).bfloat16(),
        "half": scores.astype(np.float16),
        "integers": scores.astype(np.int32),
        "function": lambda part: scores[part],
        "embeddings": (scores, np.eye(n_items, dtype=np.float32)),
        "torch embeddings": (torch.from_numpy(scores).requires_grad_(), torch.eye(n_items)),
    }
    for name, form in forms.items():
        found = rank_full(form, csr(positives), n_items, seen=csr(seen), block=block, threads=threads)
        assert frame(found).equals(wanted), name


def test_a_catalog_ranking_keeps_ids_protocol_and_fingerprint(small_dataset):
    split = make_split(small_dataset, SplitOptions(small_dataset.folder, "loo"))
    n_items = len(small_dataset.items)
    lists = data_candidates.full_ranking(split, "test")
    scores = np.random.default_rng(0).integers(0, 9, (len(small_dataset.users), n_items)).astype(float)
    records = rank_catalog(lists, scores[lists.users], system="mine", block=7, threads=2)
    assert (records.system, records.protocol, records.lists) == ("mine", lists.protocol, "user")
    assert records.candidates == lists.candidates != ""
    targets = small_dataset.interactions[split.rows("test", targets=True)].select("user", "item")
    assert frame(records).select("user", "item").equals(targets.sort("user", "item"))
    user = small_dataset.users["user"].to_list().index(records.user[3])
    item = small_dataset.items["item"].to_list().index(records.item[3])
    masked = lists.masked[lists.masked_offsets[3] : lists.masked_offsets[4]]
    left = np.delete(scores[user], masked)
    assert (records.above[3], records.n[3]) == ((left > scores[user, item]).sum(), len(left))
    embedded = rank_catalog(lists, (scores[lists.users], np.eye(n_items)), system="mine")
    assert frame(embedded).equals(frame(records))
    valid = rank_catalog(data_candidates.full_ranking(split, "valid"), scores[lists.users], system="v")
    assert valid.protocol != records.protocol and valid.candidates != records.candidates


@settings(max_examples=50, deadline=None)
@given(worlds(), st.integers(1, 7))
def test_the_device_path_counts_as_numpy_does(world, block):
    """Runs the code of tensors that are not on the CPU, on CPU tensors."""
    scores, positives, seen = world
    arguments = {"seen": csr(seen), "block": block}
    n_users, n_items = scores.shape
    wanted = frame(rank_full(scores, csr(positives), n_items, **arguments))
    listed = top_k(scores, 1 + n_items // 2, n_users, n_items, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_ranking, "_as_scores", torch.as_tensor)
        assert frame(rank_full(scores, csr(positives), n_items, **arguments)).equals(wanted)
        for found, want in zip(
            top_k(scores, 1 + n_items // 2, n_users, n_items, **arguments), listed, strict=True
        ):
            np.testing.assert_array_equal(found, want)
        with pytest.raises(DataError, match="user 0"):
            rank_full(scores * np.nan, csr([[0]] * n_users), n_items)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_equals_numpy():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 50, (300, 400)).astype(np.float32)
    positives = csr([rng.permutation(400)[:3].tolist() for _ in range(300)])
    seen = csr([rng.integers(0, 400, 30).tolist() for _ in range(300)])
    found = rank_full(torch.from_numpy(scores).cuda(), positives, 400, seen=seen)
    assert frame(found).equals(frame(rank_full(scores, positives, 400, seen=seen)))


@settings(max_examples=100, deadline=None)
@given(worlds(), st.integers(1, 7), st.integers(1, 7))
def test_top_k_is_a_stable_sort(world, k, block):
    scores, _, seen = world
    n_users, n_items = scores.shape
    k = min(k, n_items)
    lists, listed = top_k(scores, k, n_users, n_items, seen=csr(seen), block=block)
    for u in range(n_users):
        left = sorted((-scores[u, i], i) for i in range(n_items) if i not in seen[u])[:k]
        padding = k - len(left)
        assert lists[u].tolist() == [i for _, i in left] + [-1] * padding
        np.testing.assert_array_equal(listed[u], [-s for s, _ in left] + [np.nan] * padding)


def test_score_matrix_equals_candidate_lists():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (40, 9)).astype(float)
    labels = rng.integers(0, 2, (40, 9))
    labels[:, 4] = 1
    positives = [np.flatnonzero(row).tolist() for row in labels]
    wanted = frame(rank_candidates(*as_tables(scores, positives, [[]] * 40)))
    assert frame(rank_score_matrix(scores, labels)).equals(wanted)
    assert frame(rank_score_matrix(scores, labels == 1)).equals(wanted)
    ids = np.arange(360).reshape(40, 9)
    one = rank_score_matrix(scores, labels.argmax(1), users=[f"u{q}" for q in range(40)], items=ids)
    assert one.item.to_list() == ids[np.arange(40), labels.argmax(1)].tolist() and one.user[3] == "u3"


def test_embeddings_that_overflow_are_found_and_ordinary_ones_are_not_scanned():
    small, huge = np.ones((2, 4), np.float32), np.full((3, 4), 2e38, np.float32)
    with pytest.raises(DataError, match="user 'ann'"), np.errstate(over="ignore"):
        rank_full((small * 1e10, huge), csr([[0], [1]]), 3, users=["ann", "bob"])
    with pytest.raises(DataError, match="item 2"):
        rank_full((small, np.array([[1] * 4, [1] * 4, [np.inf] * 4])), csr([[0], [1]]), 3)
    with pytest.raises(DataError, match="user 'bob'"):
        rank_full((np.array([[1.0], [np.nan]]), np.ones((3, 1))), csr([[0], [1]]), 3, users=["ann", "bob"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_name_the_user(bad):
    scores = np.zeros((5, 4))
    scores[3, 2] = bad
    for form in (scores, torch.from_numpy(scores), lambda part: scores[part]):
        with pytest.raises(DataError, match="user 'u3'"):
            rank_full(form, csr([[0]] * 5), 4, users=[f"u{u}" for u in range(5)], block=2)
    with pytest.raises(DataError, match="user 'u3'"):
        rank_score_matrix(scores, np.zeros(5, int), users=[f"u{u}" for u in range(5)])
    with pytest.raises(DataError, match="user '3', item '2'"):
        rank_candidates(*as_tables(scores, [[0]] * 5, [[]] * 5))
    large = np.full((2, 3), np.finfo(np.float64).max)
    assert rank_score_matrix(large, np.array([0, 1])).tied.tolist() == [3, 3]


CANDIDATES = pl.DataFrame(
    {"user": ["a", "a", "b", "b"], "item": ["1", "2", "1", "3"], "label": [1, 0, 0, 1]},
    schema_overrides={"label": pl.Int8},
)
SCORES = pl.DataFrame({"user": ["a", "a", "b", "b"], "item": [1, 2, 1, 3], "score": [0.0, -0.0, 2.0, 1.0]})


def test_ids_match_as_text_and_strange_rows_are_counted():
    stranger = pl.DataFrame({"user": ["z"], "item": [1], "score": [np.nan]})
    records = rank_candidates(CANDIDATES, pl.concat([SCORES, stranger]))
    assert records.ignored == 1
    assert frame(records).rows() == [("a", "1", 0, 2, 2), ("b", "3", 1, 1, 2)]  # -0.0 ties with 0.0


@pytest.mark.parametrize(
    ("candidates", "scores", "message"),
    [
        (CANDIDATES, SCORES[:2], "2 of 4 candidates have no score, the first is user 'b', item '1'"),
        (CANDIDATES, pl.concat([SCORES, SCORES[2:3]]), "user 'b', item '1' has more than one score"),
        (pl.concat([CANDIDATES, CANDIDATES[:1]]), SCORES, "user 'a', item '1' stands twice"),
        (CANDIDATES.with_columns(label=0), SCORES, "2 lists have no positive, the first is user 'a'"),
        (CANDIDATES.with_columns(label=2), SCORES, "row 0 has label 2"),
        (CANDIDATES.with_columns(label=None), SCORES, "row 0 has label None"),
        (CANDIDATES.drop("label"), SCORES, "no column 'label'; found user, item"),
        (CANDIDATES, SCORES.drop("score"), "no numeric column 'score'"),
        (CANDIDATES, SCORES.with_columns(item=pl.col("item") * 0.5), "ids must be text or integers"),
        (CANDIDATES.with_columns(user=None), SCORES, "ids must be text or integers"),
        (CANDIDATES.with_columns(target=pl.lit("2")), SCORES, "row 0: label 1 must stand at the target"),
    ],
)
def test_what_cannot_be_ranked_is_refused(candidates, scores, message):
    with pytest.raises(DataError, match=message):
        rank_candidates(candidates, scores)


def test_lists_by_target_keep_two_targets_of_a_user_apart():
    rows = [("a", "x", "x", 1), ("a", "x", "n", 0), ("a", "y", "y", 1), ("a", "y", "n", 0)]
    candidates = pl.DataFrame(rows, schema=["user", "target", "item", "label"], orient="row")
    scores = pl.DataFrame({"user": ["a"] * 3, "item": ["x", "y", "n"], "score": [3.0, 1.0, 2.0]})
    records = rank_candidates(candidates, scores)
    assert records.lists == "target"
    assert frame(records).rows() == [("a", "x", 0, 1, 2), ("a", "y", 1, 1, 2)]
    by_target = candidates.with_columns(score=pl.Series([1.0, 2.0, 2.0, 1.0])).drop("label")
    assert rank_candidates(candidates, by_target).above.tolist() == [1, 0]


def test_shapes_that_do_not_fit_are_refused():
    scores = np.zeros((2, 3))
    for wrong, message in [
        (lambda: rank_full(scores, csr([[0], [3]]), 3), "item 3"),
        (lambda: rank_full(scores, csr([[0], [1, 1]]), 3), "user 1 has item 1 twice"),
        (lambda: rank_full(scores, csr([[0], [1], [2]]), 3), "shape"),
        (lambda: rank_full(np.zeros((3, 3)), csr([[0], [1]]), 3), "shape"),
        (lambda: rank_full(lambda part: scores[:1], csr([[0], [1]]), 3), "shape"),
        (lambda: rank_full(scores, csr([[0], [1]]), 3, threads=0), "threads"),
        (lambda: rank_full(scores, csr([[0], [1]]), 3, seen=csr([[0]])), "rows for 1 users"),
        (lambda: rank_full(scores, (np.array([0, 2, 1]), np.array([0])), 3), "indptr"),
        (lambda: rank_full((scores, np.zeros((3, 4))), csr([[0], [1]]), 3), "embeddings"),
        (lambda: rank_full(scores, csr([[0], [1]]), 3, block=0), "block"),
        (lambda: rank_full(scores, csr([[0], [1]]), 3, users=["a"]), "1 user ids"),
        (lambda: rank_score_matrix(scores, np.array([0, 3])), "0 to 2"),
        (lambda: rank_score_matrix(scores, np.array([[1, 0, 0], [0, 0, 0]])), "user 1"),
        (lambda: rank_score_matrix(scores, np.full((2, 3), 2)), "0 or 1"),
        (lambda: rank_score_matrix(scores, np.zeros(3, int)), "expected"),
        (lambda: rank_score_matrix(scores, np.zeros(2, int), users=["a"]), "1 ids for 2 lists"),
        (lambda: rank_score_matrix(scores, np.zeros(2, int), users=["a", None]), "number 1 is missing"),
        (lambda: rank_score_matrix(scores, np.zeros(2, int), users=np.zeros((2, 2))), "users: ids are"),
        (lambda: rank_score_matrix(scores, np.zeros(2, int), items=["a", "b", "c"]), "items .3,. and scores"),
        (lambda: rank_score_matrix(scores, np.zeros(2, int), items=[["a"], ["b", "c"]]), "items: no array"),
        (lambda: rank_full(scores, csr([[0], [1]]), 3, users=["a", None]), "number 1 is missing"),
        (lambda: top_k(scores, 4, 2, 3), "k is 4"),
    ]:
        with pytest.raises(DataError, match=message):
            wrong()


def test_records_survive_the_disk(tmp_path):
    names = {"protocol": "loo/full", "system": "päpstlich & <b>", "fingerprint": "cafe"}
    records = rank_candidates(CANDIDATES, SCORES, **names)
    records.save(tmp_path / "r.parquet")
    again = RankRecords.load(tmp_path / "r.parquet")
    assert frame(again).equals(frame(records))
    assert (again.lists, again.protocol, again.system) == ("user", "loo/full", "päpstlich & <b>")
    metadata = pl.read_parquet_metadata(tmp_path / "r.parquet")
    assert again.candidates == metadata.pop("recllm.candidates") == "cafe"
    frame(again).write_parquet(tmp_path / "old.parquet", metadata=metadata)
    assert RankRecords.load(tmp_path / "old.parquet").candidates == ""
    with pytest.raises(DataError, match=r"no\.parquet: no such file"):
        RankRecords.load(tmp_path / "no.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "r.parquet").read_bytes()[:100])
    with pytest.raises(DataError, match=r"cut\.parquet: not readable"):
        RankRecords.load(tmp_path / "cut.parquet")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "x", -1, 1, 3)], "row 0"),
        ([("a", "x", 0, 1, 3), ("b", "x", 0, 0, 3)], "row 1"),
        ([("a", "x", 2, 2, 3)], "row 0"),
        ([("a", "x", 0, 1, 3), ("a", "x", 1, 1, 3)], "more than once"),
        ([("a", "x", 0, 1, 3), ("a", "y", 1, 1, 4)], "n differs"),
        ([("a", "x", 0, 1, 3), ("a", "y", 0, 1, 3)], "contradicts"),
        ([("a", "x", 0, 2, 3), ("a", "y", 0, 3, 3)], "contradicts"),
        ([("a", "y", 1, 1, 9), ("b", "x", 0, 1, 9), ("a", "x", 0, 2, 9)], "contradicts.*stands higher"),
        ([("a", "x", 0, 1, 9), ("a", "y", 2, 3, 9), ("a", "z", 2, 3, 9), ("a", "w", 4, 1, 9)], "contradicts"),
        ([("a", "x", 0, 1, 2**31 + 1)], "row 0 .*at most"),
        ([("a", "x", 2**63 - 1, 1, 3)], "row 0 .*at most"),
    ],
)
def test_impossible_records_are_refused(tmp_path, rows, message):
    records = RankRecords(*(pl.Series(c) for c in list(zip(*rows, strict=True))[:2]), *(
        np.array(c) for c in list(zip(*rows, strict=True))[2:]
    ), lists="user")  # fmt: skip
    records.save(tmp_path / "r.parquet")
    with pytest.raises(DataError, match=message):
        RankRecords.load(tmp_path / "r.parquet")
    if "row" not in message:
        replace(records, lists="target").save(tmp_path / "r.parquet")
        RankRecords.load(tmp_path / "r.parquet")


def test_consistent_tie_groups_and_narrow_integers_are_read(tmp_path):
    rows = [
        ("a", "z", 5, 1, 9),
        ("a", "x", 0, 2, 9),
        ("b", "x", 1, 1, 9),
        ("a", "w", 2, 3, 9),
        ("a", "y", 0, 2, 9),
    ]
    metadata = {"recllm.protocol": "p", "recllm.system": "s", "recllm.lists": "user"}
    table = pl.DataFrame(rows, schema=["user", "item", "above", "tied", "n"], orient="row")
    table.write_parquet(tmp_path / "r.parquet", metadata=metadata)
    assert RankRecords.load(tmp_path / "r.parquet").above.tolist() == [5, 0, 1, 2, 0]
    wraps = pl.DataFrame({"user": ["a"], "item": ["x"], "above": [200], "tied": [100], "n": [250]})
    for kind in (pl.UInt8, pl.UInt64):
        wraps.cast({"above": kind, "tied": kind, "n": kind}).write_parquet(
            tmp_path / "r.parquet", metadata=metadata
        )
        with pytest.raises(DataError, match="row 0"):
            RankRecords.load(tmp_path / "r.parquet")
    huge = wraps.with_columns(n=pl.lit(2**64 - 1, pl.UInt64))
    huge.write_parquet(tmp_path / "r.parquet", metadata=metadata)
    with pytest.raises(DataError, match=r"row 0 .*at most"):
        RankRecords.load(tmp_path / "r.parquet")


def test_all_entrances_compare_wide_numbers_as_float64():
    near = np.array([[2**53, 2**53 + 1, 0], [2**60 + 1, 2**60, 2**60 + 2]])
    wide = np.array([[1, 1, 0], [1, 1, 1]], np.longdouble)
    wide[:, 1] += np.longdouble(1e-18)
    for scores in (near, near.astype(np.uint64), wide):
        lists = [(u, i, int(i == 0), scores[u, i].item()) for u in range(2) for i in range(3)]
        kind = pl.Float64 if scores.dtype == np.longdouble else pl.Int64
        if kind == pl.Float64:
            lists = [(*row[:3], float(row[3])) for row in lists]
        schema = {"user": pl.Int64, "item": pl.Int64, "label": pl.Int64, "score": kind}
        table = pl.DataFrame(lists, schema=schema, orient="row")
        wanted = frame(rank_candidates(table.drop("score"), table.drop("label")))
        assert wanted["tied"].to_list() == [2, 3]
        seen = csr([[2], [2]])
        assert frame(rank_score_matrix(scores, np.zeros(2, int))).equals(wanted)
        assert frame(rank_full(scores, csr([[0], [0]]), 3)).equals(wanted)
        assert rank_full(scores, csr([[0], [0]]), 3, seen=seen).tied.tolist() == [2, 2]
    with pytest.raises(DataError, match="expected real numbers"):
        rank_score_matrix(np.array([["a", "b"]]), np.zeros(1, int))


def test_repeated_users_own_several_lists_or_are_refused():
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    records = rank_score_matrix(scores, np.zeros(3, int), users=["a", "a", "b"])
    assert records.lists == "target" and records.above.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="repeats"):
        rank_score_matrix(scores, np.ones((3, 2)), users=["a", "a", "b"])
    with pytest.raises(DataError, match="repeats"):
        rank_full(scores, csr([[0]] * 3), 2, users=["a", "a", "b"])


LISTS = pl.DataFrame(
    {"user": ["a", "a", "b", "b", "c"], "item": ["1", "2", "1", "3", "2"], "label": [1, 0, 0, 1, 1]}
)
"""Two lists of two candidates, and one of one."""


def test_a_result_whose_scores_all_tie_is_an_error(tmp_path):
    """It has an AUC of exactly .5, which a table would show as a finding."""
    path = tmp_path / "candidates.parquet"
    LISTS.write_parquet(path)
    flat = LISTS.select("user", "item", score=pl.Series([2.0, 2.0, 5.0, 5.0, 1.0]))  # alike within each list
    records = rank_candidates(LISTS, flat, system="flat")
    assert records.all_tied
    with pytest.raises(DataError, match=r"flat\.parquet was not written: 'flat' scores all candidates alike"):
        records.save(tmp_path / "flat.parquet")
    assert not (tmp_path / "flat.parquet").exists()

    flat.write_parquet(tmp_path / "scores.parquet")
    with pytest.raises(DataError, match=r"scores\.parquet: 'scores' scores all .* in each of 3 lists"):
        read_system(tmp_path / "scores.parquet", Candidates.read(path))
    replace(records, above=np.array([1, 0, 0]), tied=np.ones(3, int)).save(tmp_path / "ranks.parquet")
    written = pl.read_parquet(tmp_path / "ranks.parquet").with_columns(above=0, tied="n")
    metadata = pl.read_parquet_metadata(tmp_path / "ranks.parquet")
    written.write_parquet(tmp_path / "ranks.parquet", metadata=metadata)
    with pytest.raises(DataError, match=r"ranks\.parquet: 'flat' scores all"):
        read_system(tmp_path / "ranks.parquet")


def test_some_ties_and_lists_of_one_candidate_are_results(tmp_path):
    one_differs = LISTS.select("user", "item", score=pl.Series([2.0, 2.0, 5.0, 5.5, 1.0]))
    rank_candidates(LISTS, one_differs).save(tmp_path / "one.parquet")
    single = LISTS.tail(1)
    records = rank_candidates(single, single.select("user", "item", score=pl.lit(1.0)))
    assert not records.all_tied
    records.save(tmp_path / "single.parquet")
    assert len(read_system(tmp_path / "single.parquet").records) == 1

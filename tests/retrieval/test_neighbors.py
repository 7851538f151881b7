"""Similar users: equal to a brute-force search, and nothing of the future or of what is held out."""

from __future__ import annotations

import contextlib
import io
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from recllm.cli import main
from recllm.data import splits
from recllm.data.dataset import Dataset
from recllm.data.neighbors import Neighbors, neighbors_path
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.data.user_histories import UserHistories
from recllm.errors import DataError
from recllm.rankers.batches import history_batch
from recllm.rankers.options import options_class
from recllm.rankers.run_folder import load_run
from recllm.rankers.training_data import Histories
from recllm.retrieval import nearest
from recllm.retrieval.nearest import nearest_users
from recllm.retrieval.neighbors import NeighborOptions, find_neighbors, knowledge_base
from tests.conftest import make_dataset

RECIPE = Path(__file__).parents[2] / "recipes" / "train_ranker.py"


def train(ranker: str, split: Split, out: Path) -> Path:
    """Trains a narrow ranker for an epoch, with the shipped recipe."""
    options = options_class(ranker)(ranker=ranker, split=split.folder, out=out, epochs=1, width=16)
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(RECIPE))["main"](options)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """Runs on a small log with equal times: sasrec and gru4rec by leave-one-out, sasrec by users, and bpr."""
    folder = tmp_path_factory.mktemp("neighbors")
    dataset = make_dataset(folder / "data", users=24, items=20, interactions=170)
    found = {"data": dataset.folder}
    for method, rankers in (("loo", ("sasrec", "gru4rec", "bpr")), ("users", ("sasrec",))):
        split = make_split(dataset, SplitOptions(dataset.folder, method, name=method))
        for ranker in rankers:
            found[f"{method}-{ranker}"] = train(ranker, split, folder / f"{method}-{ranker}")
    return found


def read(path: Path) -> pl.DataFrame:
    return pl.read_parquet(path)


def open_split(world, method: str) -> Split:
    return Split.open(world["data"] / "splits" / method)


def brute_force(queries, keys, k, query_users, key_users, key_places, query_places):
    """The definition: for each query all keys one by one, the best of each user, then the best users."""
    found, cosines = np.full((len(queries), k), -1), np.full((len(queries), k), np.nan, np.float32)
    for row, query in enumerate(queries):
        best: dict[int, tuple[float, int, int]] = {}
        for number, key in enumerate(keys):
            if key_users[number] == query_users[row] or not key.any() or not query.any():
                continue
            if query_places is not None and key_places[number] >= query_places[row]:
                continue
            cosine = round(float(query @ key / np.sqrt((query @ query) * (key @ key))) * 1e6)
            scored = (cosine, int(key_places[number]), number)
            best[int(key_users[number])] = max(scored, best.get(int(key_users[number]), scored))
        for rank, (cosine, _, number) in enumerate(sorted(best.values(), reverse=True)[:k]):
            found[row, rank], cosines[row, rank] = number, cosine * 1e-6
    return found, cosines


@pytest.mark.parametrize("pairs", [1, 37, 2**22])
@pytest.mark.parametrize("timed", [True, False])
def test_the_search_is_that_of_the_definition(monkeypatch, pairs, timed):
    monkeypatch.setattr(nearest, "_PAIRS", pairs)
    random = np.random.default_rng(0)
    keys = random.integers(-2, 3, (90, 3)).astype(float)  # many equal and many parallel vectors, some zero
    keys[:20] = random.standard_normal((20, 3))
    queries = np.concatenate(
        [keys[random.permutation(90)[:25]], random.standard_normal((15, 3)), np.zeros((1, 3))]
    )
    key_users = np.repeat(np.arange(6), [60, 10, 8, 6, 5, 1])  # one user has most of the keys
    query_users = random.integers(0, 9, len(queries))
    places = random.permutation(200)
    key_places, query_places = places[:90], places[90 : 90 + len(queries)] if timed else None
    for k in (1, 3, 7):
        expected = brute_force(queries, keys, k, query_users, key_users, key_places, query_places)
        found = nearest_users(
            torch.from_numpy(queries),
            torch.from_numpy(keys),
            k,
            query_users=query_users,
            key_users=key_users,
            key_places=key_places,
            query_places=query_places,
        )
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], atol=1e-9)
        assert (found[0][-1] == -1).all()  # a user without a history has no neighbors


def test_a_state_that_is_not_finite_is_refused():
    broken = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(DataError, match="not finite"):
        nearest_users(
            broken, broken, 1, query_users=np.zeros(1, int), key_users=np.ones(1, int), key_places=np.zeros(1)
        )


def states_one_by_one(run: Path, histories: list[np.ndarray]) -> np.ndarray:
    """The ranker's state of each history of item codes, each in a batch of its own."""
    ranker, opened, _ = load_run(run)
    states = []
    for items in histories:
        alone = Histories(np.array([0]), np.array([0, len(items)]), (items + 1).astype(np.int32))
        if opened.data.train.days is not None:
            alone = replace(alone, days=np.zeros(len(items)))
        batch = history_batch(opened.data, alone, np.array([0]), ranker.config.length, "cpu")
        with torch.no_grad():
            states.append(ranker.eval().states(batch)[0].double().numpy())
    return np.array(states)


@pytest.mark.parametrize("run", ["loo-sasrec", "loo-gru4rec", "users-sasrec"])
@pytest.mark.parametrize("base", ["prefixes", "last"])
@pytest.mark.parametrize("time", ["known", "any"])
def test_the_file_has_what_the_log_and_the_ranker_say(world, run, base, time):
    """From the log itself: who precedes whom is decided here by sorting (time, row), nothing is shared."""
    method = run.split("-")[0]
    split, parts = open_split(world, method), ("train", "valid", "test")
    options = NeighborOptions(
        world[run],
        top_k=2,
        base=base,
        time=time,
        next_items=2,
        parts=parts,
        targets_per_user=0,
        name=f"{run}-{base}-{time}",
    )
    frame = read(find_neighbors(options))
    dataset = split.dataset
    log = dataset.interactions.with_row_index("row")
    order = log.sort("timestamp", "row")["row"].to_list()
    place = {row: at for at, row in enumerate(order)}
    training = set(split.rows("train").tolist())
    users = log["user"].to_list()
    codes = dataset.item_codes
    of_user: dict[str, list[int]] = {}
    for row in order:
        if row in training:
            of_user.setdefault(users[row], []).append(row)
    prefixes = []  # user, rows of the prefix, rows after it
    for user, rows in of_user.items():
        lengths = (
            range(1, len(rows)) if base == "prefixes" else [max(len(rows) - 2, 1)] if len(rows) > 1 else []
        )
        prefixes += [(user, rows[:length], rows[length : length + 2]) for length in lengths]
    keys = states_one_by_one(world[run], [codes[rows] for _, rows, _ in prefixes])
    names = sorted(set(users))
    number = {user: at for at, user in enumerate(names)}
    for part in parts:
        known = {
            "train": training,
            "valid": training | set(split.rows("valid", targets=False).tolist()),
            "test": training
            | set(split.rows("valid").tolist())
            | set(split.rows("test", targets=False).tolist()),
        }[part]
        targets = [row for row in split.rows(part, targets=True).tolist()]
        before = [
            [r for r in order if r in known and users[r] == users[t] and place[r] < place[t]] for t in targets
        ]
        targets, before = zip(*((t, of) for t, of in zip(targets, before, strict=True) if of), strict=True)
        found, cosines = brute_force(
            states_one_by_one(world[run], [codes[rows] for rows in before]),
            keys,
            2,
            [number[users[row]] for row in targets],
            [number[user] for user, _, _ in prefixes],
            np.array([place[after[0]] for _, _, after in prefixes]),
            np.array([place[row] for row in targets]) if time == "known" else None,
        )
        expected = {}
        for target, keys_found, similarities in zip(targets, found, cosines, strict=True):
            for rank, (key, similarity) in enumerate(zip(keys_found, similarities, strict=True), 1):
                if key >= 0:
                    user, prefix, after = prefixes[key]
                    if time == "known":
                        after = [row for row in after if place[row] < place[target]]
                    expected[target, rank] = (user, len(prefix), after, similarity)
        here = frame.filter(pl.col("part") == part)
        got = {
            (row["target_row"], row["rank"]): (
                row["neighbor"],
                row["known"],
                row["next_rows"],
                row["similarity"],
            )
            for row in here.iter_rows(named=True)
        }
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            # Equal histories in batches of different sizes may differ in the last bits of float32.
            assert got[name][3] == pytest.approx(value[3], abs=5e-6)
        same = [got[name][:3] == value[:3] for name, value in expected.items()]
        assert np.mean(same) > 0.97
        assert all(
            row["next"] == log["item"].gather(row["next_rows"]).to_list()
            for row in here.iter_rows(named=True)
        )


@pytest.mark.parametrize("method", ["loo", "users"])
def test_nobody_is_her_own_neighbor_and_no_held_out_interaction_is_retrieved(world, method):
    split = open_split(world, method)
    options = NeighborOptions(
        world[f"{method}-sasrec"], top_k=50, time="any", next_items=9, name=f"all-{method}"
    )
    options.parts, options.targets_per_user = ("train", "valid", "test"), 0
    frame = read(find_neighbors(options))
    assert (frame["user"] != frame["neighbor"]).all()
    rows = frame["next_rows"].explode()
    assert set(rows) <= set(split.rows("train"))
    held_out = np.concatenate([split.rows(part) for part in ("valid", "test")])
    assert len(held_out) and not set(rows) & set(held_out)
    training_users = set(split.scan("train").collect()["user"])
    assert set(frame["neighbor"]) <= training_users
    if method == "users":  # whose targets these are is not known to training
        assert not set(frame.filter(pl.col("part") != "train")["user"]) & training_users
    # With this many wanted, each other training user with two interactions is a neighbor, once.
    able = sum(len(of) > 1 for of in np.split(*rows_of_users(split)))
    counts = frame.group_by("target_row").len()["len"]
    assert set(counts) <= {able, able - 1}


def rows_of_users(split: Split) -> tuple[np.ndarray, np.ndarray]:
    histories = UserHistories.of(split, "train")
    return histories.rows, histories.offsets[1:-1]


def test_the_test_part_is_not_opened_unless_named(world, monkeypatch):
    opened = []
    scan = Split.scan

    def spy(self, part, **named):
        opened.append(part)
        return scan(self, part, **named)

    monkeypatch.setattr(splits.Split, "scan", spy)
    path = find_neighbors(NeighborOptions(world["loo-sasrec"], name="spied"))
    split = open_split(world, "loo")
    Neighbors.open(path, split, ("train", "valid"))
    assert set(opened) == {"train", "valid"}


def test_a_reader_gets_the_rows_of_each_target(world):
    split = open_split(world, "loo")
    path = find_neighbors(NeighborOptions(world["loo-sasrec"], next_items=3, targets_per_user=2, name="read"))
    neighbors = Neighbors.open(path, split, ("valid",))
    frame = read(path).filter(pl.col("part") == "valid")
    for target, rows in frame.group_by("target_row", maintain_order=True).agg("next_rows").iter_rows():
        assert [each.tolist() for each in neighbors.next_rows(target)] == rows
    assert neighbors.next_rows(10**6) == []
    train = read(path).filter(pl.col("part") == "train")["target_row"]
    assert neighbors.next_rows(train[0]) == []  # of a part that was not asked for
    assert neighbors.facts["top_k"] == 3 and neighbors.time == "known"
    counts = (
        read(path).filter(pl.col("part") == "train").group_by("user").agg(pl.col("target_row").n_unique())
    )
    assert counts["target_row"].max() == 2


def own(row, split, training):
    return {"neighbor": row["user"]}


def held_out(row, split, training):
    users = split.dataset.users["user"].gather(split.dataset.user_codes).to_list()
    valid = next(at for at in split.rows("valid").tolist() if users[at] != row["user"])
    return of_row(split, valid)


def later(row, split, training):
    times = split.dataset.timestamps
    users = split.dataset.users["user"].gather(split.dataset.user_codes).to_list()
    late = next(at for at in training if times[at] > times[row["target_row"]] and users[at] != row["user"])
    return of_row(split, late)


def somebody_elses(row, split, training):
    users = split.dataset.users["user"].gather(split.dataset.user_codes).to_list()
    return {
        **of_row(split, row["next_rows"][0]),
        "neighbor": next(u for u in users if u not in (row["user"], row["neighbor"])),
    }


def misnamed(row, split, training):
    return {"next": ["i000" if row["next"] != ["i000"] else "i001"]}


def elsewhere(row, split, training):
    return {"target_row": row["target_row"] + 1}


def of_row(split, number):
    codes = split.dataset.user_codes[number], split.dataset.item_codes[number]
    return {
        "neighbor": split.dataset.users["user"][int(codes[0])],
        "next": [split.dataset.items["item"][int(codes[1])]],
        "next_rows": [number],
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (own, "the neighbor is the user"),
        (held_out, "not a training interaction"),
        (later, "does not precede"),
        (somebody_elses, "of another user"),
        (misnamed, "next and next_rows differ"),
        (elsewhere, "another interaction"),
        (lambda *_: {"next": [], "next_rows": []}, "empty"),
        (lambda *_: {"next_rows": [10**9]}, "not a row of the log"),
        (lambda *_: {"rank": 2}, "ranks"),
        (lambda *_: {"neighbor": "nobody"}, "no user 'nobody'"),
        (lambda *_: {"neighbor": None}, "gap"),
    ],
)
def test_a_planted_row_is_refused(world, tmp_path, change, words):
    split = open_split(world, "loo")
    path = neighbors_path(world["data"], "planted")
    if not path.exists():
        find_neighbors(NeighborOptions(world["loo-sasrec"], name="planted"))
    rows, metadata = read(path).to_dicts(), pl.read_parquet_metadata(path)
    place = next(at for at, row in enumerate(rows) if row["part"] == "train" and row["rank"] == 1)
    rows[place] |= change(rows[place], split, split.rows("train").tolist())
    planted = tmp_path / "planted.parquet"
    pl.DataFrame(rows, schema=read(path).schema).write_parquet(planted, metadata=metadata)
    with pytest.raises(DataError, match=words):
        Neighbors.open(planted, split, ("train",))
    Neighbors.open(planted, split, ("valid",))  # what is wrong with another part is no matter of this one


def test_what_cannot_work_is_named(world, tmp_path, capsys):
    run = str(world["loo-sasrec"])
    main(["retrieve", "neighbors", "--run", run, "--top-k", "3"])
    assert "--form mmsrarec --neighbors loo-sasrec" in capsys.readouterr().out
    path = neighbors_path(world["data"], "loo-sasrec")
    before = path.read_bytes()
    for arguments, words in (
        (["--run", run], "exists already"),
        (["--run", run, "--overwrite", "--parts", "valid"], "also has neighbors for train"),
        (["--run", run, "--top-k", "0"], "--top-k 0"),
        (["--run", run, "--next-items", "0"], "--next-items 0"),
        (["--run", run, "--targets-per-user", "-1"], "--targets-per-user -1"),
        (["--run", run, "--parts", "valid", "valid"], "each once"),
        (["--run", run, "--name", "../x"], "plain word"),
        (["--run", str(world["loo-bpr"])], "sequence ranker"),
        (["--run", str(tmp_path)], "train_ranker.py"),
    ):
        with pytest.raises(SystemExit):
            main(["retrieve", "neighbors", *arguments])
        assert words in capsys.readouterr().err
    assert path.read_bytes() == before
    loo, users = (open_split(world, method) for method in ("loo", "users"))
    with pytest.raises(DataError, match="another split"):
        Neighbors.open(path, users, ("valid",))
    with pytest.raises(DataError, match="--parts train valid test --overwrite"):
        Neighbors.open(path, loo, ("test",))
    with pytest.raises(DataError, match=r"neighbors found so far: .*loo-sasrec"):
        Neighbors.open(path.with_name("none.parquet"), loo, ("valid",))
    read(path).drop("rank").write_parquet(tmp_path / "x.parquet", metadata=pl.read_parquet_metadata(path))
    with pytest.raises(DataError, match="column 'rank'"):
        Neighbors.open(tmp_path / "x.parquet", loo, ("valid",))


def test_a_log_without_times_needs_to_be_told(tmp_path):
    dataset: Dataset = make_dataset(tmp_path / "d", users=8, items=10, interactions=50, timed=False)
    split = make_split(dataset, SplitOptions(dataset.folder, "loo", name="loo"))
    run = train("gru4rec", split, tmp_path / "gru4rec")
    with pytest.raises(DataError, match="--time any"):
        find_neighbors(NeighborOptions(run))
    frame = read(find_neighbors(NeighborOptions(run, time="any")))
    assert set(frame["part"]) == {"train", "valid"}
    assert Neighbors.open(dataset.folder / "neighbors" / "gru4rec.parquet", split, ("valid",)).time == "any"


def test_the_knowledge_base_covers_each_training_interaction_but_the_first(world):
    split = open_split(world, "loo")
    base = knowledge_base(split, "prefixes")
    rows, cuts = rows_of_users(split)
    histories = np.split(rows, cuts)
    expected = [(user, at, of[at]) for user, of in enumerate(histories) for at in range(1, len(of))]
    assert [*zip(base.users, base.known, base.rows[base.next_at], strict=True)] == expected
    last = knowledge_base(split, "last", 2)
    ends = [(user, max(len(of) - 2, 1)) for user, of in enumerate(histories) if len(of) > 1]
    assert [*zip(last.users, last.known, strict=True)] == ends
    assert all(begin < end for begin, end in zip(last.next_at, last.next_to, strict=True))

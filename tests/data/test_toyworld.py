"""The toy world: it is what it says, the same each time, and worth to each observer what is documented."""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from recllm.config import parse_config
from recllm.data import Dataset
from recllm.data.toyworld import (
    COLORS,
    OBSERVERS,
    PATTERNS,
    SHAPES,
    Parameters,
    ToyWorld,
    ToyworldConfig,
    generate,
    observer_scores,
    words,
    write_toyworld,
)
from recllm.data.toyworld.observers import posterior_of_phase, read_key
from recllm.errors import DataError
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import rank_candidates


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return generate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "world"
    write_toyworld(ToyworldConfig(out=out, users=30, items=60, seed=3))
    return out


def candidates_of(world: ToyWorld, back: int = 0, negatives: int = 20) -> pl.DataFrame:
    """1 + 20 uniform candidates for each user's last interaction (or one `back` from it)."""
    rng = np.random.default_rng(42)
    histories = (
        world.interaction_answers.sort("user", "position").group_by("user", maintain_order=True).agg("item")
    )
    everything, rows = world.items["item"].to_numpy(), []
    for user, history in histories.iter_rows():
        untouched = np.setdiff1d(everything, history)
        chosen = [history[-1 - back], *rng.choice(untouched, negatives, replace=False)]
        rows += [(user, chosen[0], item, int(item == chosen[0])) for item in chosen]
    schema = {"user": pl.String, "target": pl.String, "item": pl.String, "label": pl.Int8}
    return pl.DataFrame(rows, schema=schema, orient="row")


def auc_of(world: ToyWorld, candidates: pl.DataFrame, observer: str) -> float:
    scores = observer_scores(world, candidates, observer)
    return compute_metrics(rank_candidates(candidates, scores), names=["auc"]).mean()["auc"]


# ---- what the tables say


def words_in(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_titles_texts_and_profiles_hold_no_attribute_word() -> None:
    assert {*COLORS, *PATTERNS, *SHAPES} <= words.ATTRIBUTE_WORDS
    told = [f(maker, category) for f in (words.title_of, words.text_of)
            for maker in words.MAKERS for category in words.CATEGORIES]  # fmt: skip
    told += [words.profile_of(c, kind) for c in words.CATEGORIES for kind in range(words.PROFILE_KINDS)]
    told += [*words.CATEGORIES, *words.PLURALS.values()]
    for text in told:
        assert not words_in(text) & words.ATTRIBUTE_WORDS, text


def test_the_tables_hold_only_those_texts(world: ToyWorld) -> None:
    ids = {"item", "images", "user", "timestamp", "rating", "review"}
    for frame in (world.items, world.users):
        for column in set(frame.columns) - ids:
            for value in frame[column].to_list():
                assert not words_in(str(value)) & words.ATTRIBUTE_WORDS


def test_text_does_not_identify_an_item(world: ToyWorld) -> None:
    shared = world.items.join(world.item_answers, on="item").group_by("title", "text", "categories", "maker")
    facts = shared.agg(pl.len(), looks=pl.struct("color", "pattern", "shape").n_unique())
    assert facts["len"].min() >= 2 and facts["looks"].min() >= 2
    assert world.items["title"].n_unique() == len(words.MAKERS) * len(words.CATEGORIES)


def test_attributes_are_balanced(world: ToyWorld) -> None:
    for column, count in (("color", 6), ("pattern", 4), ("shape", 4), ("category", 5)):
        counts = world.item_answers[column].value_counts()["count"]
        assert len(counts) == count and counts.max() - counts.min() <= 8
    combinations = world.item_answers.select("color", "pattern", "shape").n_unique()
    assert combinations == 6 * 4 * 4


def test_profiles_tell_the_liked_category(world: ToyWorld) -> None:
    for profile, favorite in world.users.select("profile", "favorite").iter_rows():
        named = {name for name in words.CATEGORIES if {name, words.PLURALS[name]} & words_in(profile)}
        assert named == {favorite}


def test_reviews_name_the_attributes_in_varied_sentences(world: ToyWorld) -> None:
    rows = world.interactions.join(world.item_answers, on="item", maintain_order="left")
    values = {*COLORS, *PATTERNS, *SHAPES}
    shells = set()
    for review, *look in rows.select("review", "color", "pattern", "shape").iter_rows():
        assert words_in(review) & values == set(look)
        shells.add(re.sub("|".join(look), "_", review, flags=re.IGNORECASE))
    assert len(shells) > 60


def test_ratings_follow_the_match(world: ToyWorld) -> None:
    ratings = world.interactions["rating"].to_numpy()
    assert set(np.unique(ratings)) == {1, 2, 3, 4, 5}
    noise = world.interaction_answers["noise"].to_numpy()
    assert ratings[~noise].mean() > 3.9 and ratings[noise].mean() < 2.8
    assert 0.01 < noise.mean() < 0.02


# ---- the histories


def test_no_item_twice_and_times_increase(world: ToyWorld) -> None:
    log = world.interactions
    assert log.select("user", "item").n_unique() == len(log)
    assert log["timestamp"].is_sorted()
    gaps = log.group_by("user", maintain_order=True).agg(pl.col("timestamp").diff().drop_nulls())
    assert gaps["timestamp"].explode().min() >= 60
    span = log["timestamp"].max() - log["timestamp"].min()
    assert 600 * 86_400 < span <= 730 * 86_400
    firsts = log.group_by("user").agg(pl.col("timestamp").min())["timestamp"]
    assert firsts.max() - firsts.min() > 300 * 86_400
    assert log.select("user", "item").equals(world.interaction_answers.select("user", "item"))


def test_taste_drifts_and_picks_follow_it(world: ToyWorld) -> None:
    key = read_key(world)
    for tastes in key.tastes:
        assert len({tuple(taste) for taste in tastes}) == world.parameters.phases
    rows, places = np.nonzero(key.taken >= 0)
    look = key.attributes[key.taken[rows, places]]
    phase = key.phase[rows, places]
    now = (key.tastes[rows, phase] == look).sum(axis=1)
    later = (key.tastes[rows, (phase + 3) % world.parameters.phases] == look).sum(axis=1)
    assert now.mean() > 1.6 and later.mean() < 0.7


def test_the_last_phase_cannot_be_told_by_its_length() -> None:
    world = generate(users=4000, items=100, seed=1)
    key = read_key(world)
    history = np.arange(key.taken.shape[1]) < key.total[:, None] - 1
    phases = world.parameters.phases
    counts = np.stack([(history & (key.phase == n)).sum(axis=1) for n in range(phases)], axis=1)
    assert counts.min() == world.parameters.shortest and counts.max() == world.parameters.longest
    assert np.abs(counts.mean(axis=0) - 3.5).max() < 0.04
    begun, left = np.full(4000, phases), np.zeros(4000, dtype=int)
    assert np.allclose(posterior_of_phase(counts, begun, left, world.parameters), 1 / phases)


@pytest.mark.parametrize(("phases", "shortest", "longest"), [(3, 1, 2), (2, 1, 3), (3, 2, 4), (1, 1, 2)])
def test_posterior_equals_enumeration(phases: int, shortest: int, longest: int) -> None:
    """All lengths x all orders of labeled tastes, each equally probable: count who is present."""
    parameters = Parameters(users=1, items=100, phases=phases, shortest=shortest, longest=longest)
    found: dict[tuple, Counter] = {}
    for lengths in itertools.product(range(shortest, longest + 1), repeat=phases):
        sequence = [number for number, length in enumerate(lengths) for _ in range(length)] + [phases - 1]
        for position, present in enumerate(sequence):
            counted = Counter(sequence[:position])
            for order in itertools.permutations(range(present + 1)):
                counts = [0] * phases
                for number in range(present + 1):
                    counts[order[number]] = counted[number]
                # each set of lengths splits its weight over the orders of the phases begun
                seen = (*counts, present + 1, len(sequence) - position - 1)
                found.setdefault(seen, Counter())[order[present]] += 1
    for (*counts, begun, left), present in found.items():
        got = posterior_of_phase(np.array([counts]), np.array([begun]), np.array([left]), parameters)[0]
        expected = np.array([present[number] for number in range(phases)]) / sum(present.values())
        assert np.allclose(got, expected), (counts, begun, left)


# ---- the ceilings


def test_ceilings_are_in_their_bands() -> None:
    """Means over three seeds; the documented bands, with a margin for 1,500 lists."""
    values: dict[str, list[float]] = {name: [] for name in OBSERVERS}
    for seed in range(3):
        world = generate(seed=seed)
        candidates = candidates_of(world)
        for name in OBSERVERS:
            values[name].append(auc_of(world, candidates, name))
    auc = {name: float(np.mean(found)) for name, found in values.items()}
    assert auc["oracle"] > 0.94
    assert auc["recent"] > 0.90
    assert 0.74 < auc["order_blind"] < 0.81
    assert 0.55 < auc["sightless"] < 0.62
    assert min(np.subtract(values["recent"], values["order_blind"])) > 0.08


def test_without_drift_order_is_worth_nothing() -> None:
    world = generate(users=300, items=100, seed=0, phases=1, longest=8)
    candidates = candidates_of(world)
    assert auc_of(world, candidates, "order_blind") == auc_of(world, candidates, "oracle")


def test_oracle_probabilities_are_true() -> None:
    """Over the whole untouched catalog they sum to 1, and to as much at the targets as chance expects."""
    world = generate(users=400, items=60, seed=0, phases=2)
    key = read_key(world)
    ids = world.items["item"].to_numpy()
    rows, expected, got = [], 0.0, 0.0
    for user, name in enumerate(world.users["user"]):
        last = key.total[user] - 1
        free = np.setdiff1d(np.arange(60), key.taken[user, :last])
        rows += [(name, ids[key.taken[user, last]], ids[item]) for item in free]
    frame = pl.DataFrame(rows, schema=["user", "target", "item"], orient="row")
    for observer in ("oracle", "order_blind", "sightless"):
        scored = observer_scores(world, frame, observer)
        sums = scored.group_by("user").agg(pl.col("score").sum())["score"].to_numpy()
        assert np.allclose(sums, 1)
        expected = scored.select((pl.col("score") ** 2).sum()).item()
        got = scored.filter(pl.col("item") == pl.col("target"))["score"].sum()
        if observer != "sightless":  # which is true on average over catalogs, not in each
            assert abs(got - expected) < 0.12 * expected, observer


def test_recent_by_hand() -> None:
    world = generate(users=5, items=60, seed=2, phases=2)
    looks = {row[0]: row[1:4] for row in world.item_answers.iter_rows()}
    candidates = candidates_of(world)
    scored = observer_scores(world, candidates, "recent")
    for user, _, item, score in scored.iter_rows():
        history = world.interactions.filter(pl.col("user") == user)["item"].to_list()[-4:-1]
        assert score == sum(a == b for h in history for a, b in zip(looks[h], looks[item], strict=True))


def test_row_order_and_blocks_do_not_matter(world: ToyWorld) -> None:
    candidates = candidates_of(world)
    shuffled = candidates.sample(fraction=1, shuffle=True, seed=1)
    for observer in OBSERVERS:
        a = observer_scores(world, candidates, observer)
        b = observer_scores(world, shuffled, observer)
        assert b.select("user", "target", "item").equals(shuffled.select("user", "target", "item"))
        assert a.sort("user", "item").equals(b.sort("user", "item"))


# ---- files and determinism


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".parquet", ".png")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    write_toyworld(ToyworldConfig(out=again, users=30, items=60, seed=3))
    write_toyworld(ToyworldConfig(out=other, users=30, items=60, seed=4))
    first = digests(folder)
    assert len(first) == 60 + 3 + 2
    assert digests(again) == first
    assert not set(digests(other).values()) & set(first.values())


def test_more_users_leave_items_and_first_users_alone() -> None:
    few, many = generate(users=20, seed=5), generate(users=3000, seed=5)
    assert few.items.equals(many.items) and few.item_answers.equals(many.item_answers)
    assert few.users.equals(many.users.head(20))
    for small, large in (
        (few.interactions, many.interactions),
        (few.interaction_answers, many.interaction_answers),
    ):
        assert small.equals(large.filter(pl.col("user").is_in(few.users["user"].implode())))


def test_folder_opens_and_reads_back(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.manifest["source"]["parameters"]["seed"] == 3
    assert dataset.manifest["counts"]["items_with_image"] == 60
    picture = Image.open(folder / dataset.items["images"][0][0])
    assert picture.size == (56, 56) and picture.format == "PNG"
    world, read = generate(users=30, items=60, seed=3), ToyWorld.open(folder)
    assert read.interactions.equals(world.interactions) and read.parameters == world.parameters
    assert read.interaction_answers.equals(world.interaction_answers)
    candidates = candidates_of(world, negatives=5)
    for source in (dataset, folder, str(folder)):
        scored = observer_scores(source, candidates, "order_blind")
        assert scored.equals(observer_scores(world, candidates, "order_blind"))


def test_command_line(tmp_path: Path) -> None:
    out = tmp_path / "w"
    arguments = ["--users", "5", "--items", "60", "--seed", "9", str(out)]
    dataset = write_toyworld(parse_config(ToyworldConfig, arguments))
    assert dataset.manifest["counts"]["users"] == 5
    with pytest.raises(DataError, match="exists"):
        write_toyworld(parse_config(ToyworldConfig, arguments))
    write_toyworld(parse_config(ToyworldConfig, [*arguments, "--overwrite"]))


# ---- hostile requests


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"users": 0}, "at least one user"),
        ({"users": -3}, "at least one user"),
        ({"items": 2}, "at least 50 items, or fewer phases"),
        ({"items": 0, "phases": 1}, "at least 6 items"),
        ({"seed": -1}, "0 or more"),
        ({"phases": 0}, "1 to 16"),
        ({"phases": 17}, "1 to 16"),
        ({"noise": 1.0}, "below 1"),
        ({"shortest": 0}, "shortest"),
        ({"shortest": 5, "longest": 4}, "shortest"),
    ],
)
def test_impossible_worlds_are_refused(request_: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(**request_)


def test_smallest_worlds() -> None:
    one = generate(users=1)
    assert one.interactions["user"].n_unique() == 1
    tight = generate(users=50, items=50)
    assert tight.interactions.select("user", "item").n_unique() == len(tight.interactions)
    pair = generate(users=3, items=3, phases=1, shortest=1, longest=1)
    assert len(pair.interactions) == 6
    scores = observer_scores(pair, candidates_of(pair, negatives=1), "order_blind")
    assert scores["score"].is_finite().all()


def test_strange_candidates_are_refused(world: ToyWorld) -> None:
    candidates = candidates_of(world).head(21)
    with pytest.raises(DataError, match="order_blind"):
        observer_scores(world, candidates, "clairvoyant")
    with pytest.raises(DataError, match="'target'"):
        observer_scores(world, candidates.drop("target"), "oracle")
    with pytest.raises(DataError, match="'i99999' does not exist"):
        observer_scores(world, candidates.with_columns(item=pl.lit("i99999")), "oracle")
    never = candidates.with_columns(target=pl.lit(candidates["item"][5]))
    with pytest.raises(DataError, match="no interaction with the target"):
        observer_scores(world, never, "oracle")


def test_a_folder_without_its_answer_key_says_so(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "truth" / "items.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(DataError, match="answer key"):
        ToyWorld.open(bare)
    (bare / "truth" / "parameters.json").write_text('{"wings": 2}')
    with pytest.raises(DataError, match="wings"):
        ToyWorld.open(bare)
    shutil.rmtree(bare / "truth")
    with pytest.raises(DataError, match="answer key"):
        ToyWorld.open(bare)

"""Validation lists of some users choose the epoch, and vectors made from another split are refused."""

from __future__ import annotations

import polars as pl
import pytest

from recllm.data.candidates import full_ranking
from recllm.data.origins import MADE
from recllm.data.splits import SplitOptions, make_split
from recllm.errors import DataError
from recllm.evaluation import compute_metrics, rank_catalog
from recllm.rankers import ranker_class
from recllm.rankers.features import check_learned_from
from recllm.rankers.fit import FitOptions, fit, seed_weights
from recllm.rankers.ranking import user_states
from recllm.rankers.training_data import TrainingData
from tests.conftest import make_dataset


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    dataset = make_dataset(tmp_path_factory.mktemp("validation") / "shop")
    return make_split(dataset, SplitOptions(dataset.folder, "loo", name="loo"))


def test_the_epoch_is_chosen_by_the_named_users_alone(split, tmp_path):
    named = [f"u{number:03d}" for number in range(0, 60, 4)]
    pl.DataFrame({"user": named}).write_parquet(tmp_path / "named.parquet")
    data = TrainingData.of(split)
    seed_weights(1)
    ranker = ranker_class("sasrec")(data, ranker_class("sasrec").Config(width=8, heads=1))
    options = FitOptions(epochs=3, seed=1, valid_only=str(tmp_path / "named.parquet"))
    fitted = fit(ranker, data, split, options)
    ranking = full_ranking(split, "valid")
    scores = user_states(ranker, data, split, "valid", ranking.users).for_ranking()
    table = compute_metrics(rank_catalog(ranking, scores, system="x"), names=["ndcg@20"]).per_user()
    mine, others = (
        table.filter(pl.col("user").is_in(named) == own)["ndcg@20"].mean() for own in (True, False)
    )
    assert fitted.valid["ndcg@20"] == pytest.approx(mine) and mine != pytest.approx(others)


def test_users_without_a_validation_target_are_named(split, tmp_path):
    pl.DataFrame({"user": ["u001", "nobody"]}).write_csv(tmp_path / "named.csv")
    data = TrainingData.of(split)
    ranker = ranker_class("sasrec")(data, ranker_class("sasrec").Config(width=8, heads=1))
    with pytest.raises(DataError, match="user 'nobody' has no validation target"):
        fit(ranker, data, split, FitOptions(epochs=1, valid_only=str(tmp_path / "named.csv")))


def test_vectors_that_say_another_split_are_refused(split, tmp_path):
    import torch
    from safetensors.torch import save_file

    other = make_split(split.dataset, SplitOptions(split.dataset.folder, "ratio", order="time", name="other"))
    path = tmp_path / "v.safetensors"
    save_file({"i001": torch.ones(2)}, path, {MADE: f'{{"split_hash": "{other.split_hash}"}}'})
    check_learned_from(str(path), other)
    check_learned_from("tiny", split)
    with pytest.raises(DataError, match=r"made from another split than .* embed the images under prompts"):
        check_learned_from(str(path), split)
    save_file({"i001": torch.ones(2)}, path)
    check_learned_from(str(path), split)

"""Vectors of items: what files may hold, what is refused, and that nothing is invented for an item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.numpy
import torch

from recllm.data.dataset import Dataset
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.rankers.features import Features, image_features, read_features, text_features
from recllm.rankers.layers import FrozenFeatures, Projection
from recllm.rankers.training_data import TrainingData, _prices
from tests.rankers.worlds import tiny_split

WIDTH = 5


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    return tiny_split(tmp_path_factory.mktemp("features") / "data")


@pytest.fixture
def dataset(split) -> Dataset:
    return split.dataset


@pytest.fixture
def matrix(dataset) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(dataset.items), WIDTH)).astype(np.float32)


def put(path: Path, array: np.ndarray, ids: list[str] | None = None) -> Path:
    np.save(path, array)
    if ids is not None:
        path.with_name(f"{path.stem}.items.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return path


def code_of(dataset: Dataset) -> dict[str, int]:
    return {item: code for code, item in enumerate(dataset.items["item"])}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_without_names_follows_the_catalog_if_it_is_said_to(dataset, matrix, tmp_path, dtype):
    found = read_features(dataset, put(tmp_path / "v.npy", matrix.astype(dtype)), order="dataset")
    assert found.vectors.dtype == np.float32 and found.present.all() and found.source == "v.npy"
    assert np.array_equal(found.vectors, matrix.astype(dtype).astype(np.float32))


def test_npy_with_names_goes_by_them(dataset, matrix, tmp_path):
    """In any order, with items that the catalog does not have, and without some that it has."""
    ids = ["stranger", *dataset.items["item"].to_list()[::-1][:-2], "another stranger"]
    rows = np.random.default_rng(1).standard_normal((len(ids), WIDTH)).astype(np.float32)
    found = read_features(dataset, put(tmp_path / "v.npy", rows, ids))
    assert found.present.sum() == len(ids) - 2 and not found.vectors[~found.present].any()
    for item, row in list(zip(ids, rows, strict=True))[1:-1]:
        assert np.array_equal(found.vectors[code_of(dataset)[item]], row)


def test_safetensors_go_by_id(dataset, tmp_path):
    ids = dataset.items["item"].to_list()
    rows = {item: np.full(WIDTH, number + 1, np.float16) for number, item in enumerate(ids[3:])}
    path = tmp_path / "v.safetensors"
    safetensors.numpy.save_file({**rows, "stranger": np.ones(2, np.float32)}, path)
    found = read_features(dataset, path)
    assert found.vectors.dtype == np.float32 and found.vectors.shape == (len(ids), WIDTH)
    assert found.present.tolist() == [False] * 3 + [True] * (len(ids) - 3)
    assert found.vectors[3:, 0].tolist() == list(range(1, len(ids) - 2)) and not found.vectors[:3].any()


@pytest.mark.parametrize("kind", ["npy", "named npy", "safetensors"])
def test_rows_of_nan_are_items_without_the_modality(dataset, matrix, tmp_path, kind):
    matrix[[2, 7]] = np.nan
    ids = dataset.items["item"].to_list()
    path = tmp_path / ("v.safetensors" if kind == "safetensors" else "v.npy")
    if kind == "safetensors":
        safetensors.numpy.save_file(dict(zip(ids, matrix, strict=True)), path)
    else:
        put(path, matrix, ids if kind == "named npy" else None)
    found = read_features(dataset, path, order="dataset" if kind == "npy" else None)
    assert np.flatnonzero(~found.present).tolist() == [2, 7]
    assert not found.vectors[[2, 7]].any() and np.isfinite(found.vectors).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["npy", "safetensors"])
def test_a_number_that_is_none_is_refused_with_its_item(dataset, matrix, tmp_path, value, kind):
    matrix[4, 1] = value
    path = tmp_path / f"v.{kind}"
    if kind == "npy":
        put(path, matrix)
    else:
        safetensors.numpy.save_file(dict(zip(dataset.items["item"], matrix, strict=True)), path)
    with pytest.raises(DataError, match=f"{dataset.items['item'][4]!r}.*NaN or infinite"):
        read_features(dataset, path, order="dataset")


def objects(path: Path, count: int) -> None:
    np.save(path, np.array([{"a": 1}] * count, dtype=object), allow_pickle=True)


def zipped(path: Path, count: int) -> None:
    with path.open("wb") as file:
        np.savez(file, vectors=np.ones((count, WIDTH), np.float32))


def cut_off(path: Path, count: int) -> None:
    np.save(path, np.ones((count, WIDTH), np.float32))
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (objects, "pickle"),
        (zipped, "npy"),
        (cut_off, "not readable"),
        (lambda path, count: path.write_bytes(b""), "not readable"),
        (lambda path, count: path.write_text("0.1 0.2"), "not readable"),
        (lambda path, count: np.save(path, np.ones((count + 1, WIDTH), np.float32)), "expects as many"),
        (lambda path, count: np.save(path, np.ones((count - 1, WIDTH), np.float32)), "expects as many"),
        (lambda path, count: np.save(path, np.ones(count, np.float32)), "items, width"),
        (lambda path, count: np.save(path, np.ones((count, 2, 2), np.float32)), "items, width"),
        (lambda path, count: np.save(path, np.ones((count, WIDTH), np.int64)), "floats"),
        (lambda path, count: np.save(path, np.full((count, WIDTH), "a")), "floats"),
        (lambda path, count: np.save(path, np.full((count, WIDTH), np.nan)), "no vector for any"),
    ],
)
def test_a_npy_of_another_kind_is_refused(dataset, tmp_path, write, message):
    path = tmp_path / "v.npy"
    write(path, len(dataset.items))
    with pytest.raises(DataError, match=message) as refused:
        read_features(dataset, path, order="dataset")
    assert str(path) in str(refused.value)


def test_a_pickle_is_not_run(dataset, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    trapped = np.empty(len(dataset.items), dtype=object)
    trapped[:] = [Trap()] * len(trapped)
    np.save(tmp_path / "v.npy", trapped, allow_pickle=True)
    with pytest.raises(DataError):
        read_features(dataset, tmp_path / "v.npy")
    assert not (tmp_path / "ran").exists()


def test_names_that_do_not_fit_are_refused(dataset, matrix, tmp_path):
    ids = dataset.items["item"].to_list()
    with pytest.raises(DataError, match="expected as many"):
        read_features(dataset, put(tmp_path / "v.npy", matrix, ids[:-1]))
    with pytest.raises(DataError, match="stands twice"):
        read_features(dataset, put(tmp_path / "v.npy", matrix, [*ids[:-1], ids[0]]))
    with pytest.raises(DataError, match="no vector for any"):
        read_features(dataset, put(tmp_path / "v.npy", matrix, [f"x{item}" for item in ids]))
    (tmp_path / "v.items.txt").write_bytes("\n".join(["Café", *ids[1:]]).encode("latin-1"))
    with pytest.raises(DataError, match=r"v\.items\.txt"):
        read_features(dataset, tmp_path / "v.npy")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"common1": np.ones(4, np.float32), "common2": np.ones(5, np.float32)}, "expected one width"),
        ({"common1": np.ones((2, 2), np.float32)}, "expected one width"),
        ({"common1": np.array(1.0, np.float32)}, "expected one width"),
        ({"stranger": np.ones(4, np.float32)}, "no vector for any"),
        (None, "not readable as safetensors"),
    ],
)
def test_safetensors_of_another_kind_are_refused(dataset, tmp_path, tensors, message):
    path = tmp_path / "v.safetensors"
    path.write_bytes(b"pickled?" if tensors is None else safetensors.numpy.save(tensors))
    with pytest.raises(DataError, match=message):
        read_features(dataset, path)


def test_both_modalities_take_files_and_name_one_that_is_missing(dataset, matrix, tmp_path):
    path = put(tmp_path / "v.npy", matrix)
    expected = read_features(dataset, path, order="dataset").fingerprint
    for of in (text_features, image_features):
        assert of(dataset, str(path), order="dataset").fingerprint == expected
        for name in ("none.npy", "none.safetensors"):
            with pytest.raises(DataError, match=f"{name}.*no such file"):
                of(dataset, str(tmp_path / name))


def test_the_fingerprint_is_of_vectors_and_marks(matrix):
    present = np.ones(len(matrix), bool)
    one = Features(matrix, present, "a")
    assert one.fingerprint == Features(np.asfortranarray(matrix), present.copy(), "b").fingerprint
    other = matrix.copy()
    other[-1, -1] += 1e-6
    marks = present.copy()
    marks[-1] = False
    pairs = [
        (other, present),
        (matrix, marks),
        (matrix.reshape(-1, WIDTH * 2), present[::2]),
        (matrix[:-1], present[:-1]),
    ]
    assert len({one.fingerprint, *(Features(*pair, "a").fingerprint for pair in pairs)}) == 5


def test_features_of_another_shape_are_refused(matrix):
    for vectors, present in ((matrix, np.ones(len(matrix) - 1, bool)), (matrix[0], np.ones(WIDTH, bool))):
        with pytest.raises(ValueError, match="present"):
            Features(vectors, present, "a")


def test_items_without_a_vector_and_padding_are_projected_to_zero(matrix):
    present = np.arange(len(matrix)) != 3
    features = Features(matrix * present[:, None], present, "a")
    torch.manual_seed(0)
    projection = Projection(features, 4)
    torch.nn.init.ones_(projection.linear.bias)
    whole, rows = projection(), projection(torch.tensor([[0, 4, 1], [2, 0, len(matrix)]]))
    expected = features.vectors @ projection.linear.weight.detach().numpy().T + 1
    expected[3] = 0
    assert np.allclose(whole.detach().numpy(), expected, atol=1e-5)
    assert not rows[0, 0].any() and not rows[1, 1].any() and not rows[0, 1].any()
    assert torch.allclose(rows[0, 2], whole[0]) and torch.allclose(rows[1, 2], whole[-1])
    assert not projection(zeroed=True).any() and projection(zeroed=True).shape == whole.shape
    assert not FrozenFeatures(features).state_dict() and list(FrozenFeatures(features).parameters()) == []


@pytest.mark.parametrize("width", [WIDTH, 384])
def test_training_data_takes_features_and_what_the_catalog_says(split, dataset, width):
    given = Features(np.ones((len(dataset.items), width), np.float32), np.ones(len(dataset.items), bool), "a")
    data = TrainingData.of(split, {"text": given})
    assert data.features["text"] is given and set(data.features) == {"text"}
    names = [item.rstrip("0123456789") for item in dataset.items["item"]]
    kinds = ["all", *sorted(set(names))]
    assert data.categories.tolist() == [[kind in ("all", name) for kind in kinds] for name in names]
    told = [np.nan if number % 4 == 1 else number + 1.5 for number in range(len(names))]
    assert np.array_equal(data.prices, np.array(told, np.float32), equal_nan=True)


def test_texts_are_embedded_and_an_item_without_one_has_none(dataset):
    pytest.importorskip("sentence_transformers")
    from recllm.mllm.embedding import embed_texts

    found = text_features(dataset)
    codes = code_of(dataset)
    assert found.vectors.shape == (len(dataset.items), 384)
    assert np.flatnonzero(~found.present).tolist() == [codes["common6"]]
    assert not found.vectors[codes["common6"]].any()
    made = embed_texts(["Thing common3"]).vectors[0]
    assert np.abs(found.vectors[codes["common3"]] - made).max() < 1e-5
    assert text_features(dataset).fingerprint == found.fingerprint
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        text_features(dataset, "nowhere")


def test_images_are_the_mean_of_their_tokens_and_a_broken_one_is_none(tiny_path, tmp_path):
    from recllm.mllm.loading import load
    from recllm.mllm.vision.images import load_image

    dataset = tiny_split(tmp_path / "data", users=3).dataset
    folder = tmp_path / "data" / "images"
    (folder / "common7.png").write_bytes(b"")  # emptied after the import
    found = image_features(dataset, str(tiny_path))
    codes = code_of(dataset)
    lacking = {"common1", "common4", "common7"}
    assert set(np.flatnonzero(~found.present)) == {codes[item] for item in lacking}
    assert not found.vectors[~found.present].any() and np.isfinite(found.vectors).all()

    loaded = load(str(tiny_path))
    images = [load_image(folder / f"common{number}.png") for number in (2, 3, 0)]
    inputs = loaded.processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        tower = loaded.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    tokens = getattr(tower, "pooler_output", tower)
    means = np.stack([each.float().mean(0).numpy() for each in tokens])
    assert np.abs(found.vectors[codes["common3"]] - means[1]).max() < 1e-2
    assert np.abs(found.vectors[codes["common2"]] - means[:2].mean(0)).max() < 1e-2
    assert np.abs(found.vectors[codes["common0"]] - found.vectors[codes["common3"]]).max() > 0.05


def test_numbers_whose_squares_are_infinite_are_refused(dataset, matrix, tmp_path):
    matrix = matrix.copy()
    matrix[3, 0] = 1e20
    with pytest.raises(DataError, match=dataset.items["item"][3]):
        read_features(dataset, put(tmp_path / "v.npy", matrix), order="dataset")


def test_prices_are_read_or_not_known():
    told = [
        "$12.50",
        "1,212.50",
        ".99",
        "$.99",
        "EUR 7",
        "-5",
        "12,50 EUR",
        "1.299,00",
        "5 - 9",
        "",
        None,
        "0",
    ]
    prices = _prices(pl.DataFrame({"price": told}))
    expected = [12.5, 1212.5, 0.99, 0.99, 7] + [np.nan] * 7
    np.testing.assert_allclose(prices, expected)
    assert _prices(pl.DataFrame({"price": [[1.0], [2.0]]})) is None
    np.testing.assert_allclose(_prices(pl.DataFrame({"price": [1.5, -2, None]})), [1.5, np.nan, np.nan])

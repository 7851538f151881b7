"""Whose row is whose: orders of matrices without ids, on MMRec's numbers and on the order of a source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recllm.data.dataset import Dataset, write_dataset
from recllm.data.importing import import_dataset
from recllm.data.readers import PreSplit, RecBole, Table
from recllm.errors import DataError
from recllm.rankers.features import read_features

ITEMS = 12


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Dataset:
    """Items 0 to 11, which stand as 0, 1, 10, 11, 2 ... in items.parquet."""
    return dataset_of(tmp_path_factory.mktemp("numbered") / "data", [str(item) for item in range(ITEMS)])


def dataset_of(folder: Path, ids: list[str]) -> Dataset:
    log = pl.DataFrame({"user": ["u"] * len(ids), "item": ids})
    items = pl.DataFrame({"item": sorted(ids)})
    return write_dataset(
        folder, items=items, interactions=log, users=pl.DataFrame({"user": ["u"]}), source={}
    )


def file_of(folder: Path, rows: int = ITEMS) -> Path:
    """Writes vectors in which row i is i + 1."""
    np.save(folder / "v.npy", np.arange(1, rows + 1, dtype=np.float32)[:, None])
    return folder / "v.npy"


def row_of(dataset: Dataset, path: Path, order: str | None) -> dict[str, int]:
    """Returns which row of `file_of` each item got."""
    found = read_features(dataset, path, order=order)
    return {
        item: int(vector[0]) - 1
        for item, vector, there in zip(dataset.items["item"], found.vectors, found.present, strict=True)
        if there
    }


def test_numeric_order_gives_each_item_the_row_of_its_number(numbered, tmp_path):
    assert numbered.items["item"].to_list()[:4] == ["0", "1", "10", "11"]
    assert row_of(numbered, file_of(tmp_path), "numeric") == {str(item): item for item in range(ITEMS)}


def test_a_file_without_ids_and_order_is_refused_with_the_choices(numbered, tmp_path):
    with pytest.raises(DataError, match=r"v\.npy: .*--feature-order.*numeric.*dataset.*FILE") as refused:
        read_features(numbered, file_of(tmp_path))
    assert "source" not in str(refused.value)  # no items table was imported
    named = dataset_of(tmp_path / "named", ["a", "b"])
    with pytest.raises(DataError, match="--feature-order with one of dataset") as refused:
        read_features(named, file_of(tmp_path, 2))
    assert "numeric" not in str(refused.value)


def test_numbers_are_whole_and_written_one_way(tmp_path):
    for odd in ("007", "1.5", "-3", "B00"):
        dataset = dataset_of(tmp_path / odd, ["1", "2", odd])
        with pytest.raises(DataError, match=f"{odd!r}.* is not a whole number"):
            read_features(dataset, file_of(tmp_path, 3), order="numeric")
    gaps = dataset_of(tmp_path / "gaps", ["100", "20", "3"])
    assert row_of(gaps, file_of(tmp_path, 3), "numeric") == {"3": 0, "20": 1, "100": 2}
    for rows in (2, 4, 101):
        with pytest.raises(DataError, match=f"{rows} rows, but .* 3 items.*expects as many.*FILE"):
            read_features(gaps, file_of(tmp_path, rows), order="numeric")


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_mapping_names_the_row_of_each_item(numbered, tmp_path, separator):
    """Rows may be left over, such as padding, and items of another catalog may stand in it."""
    lines = [f"{item + 1}{separator}{item}" for item in range(ITEMS)]
    mapping = tmp_path / "mapping.csv"
    lines.append(f"{ITEMS + 1}{separator}stranger")
    mapping.write_text("\r\n".join([f"row{separator}item", *lines]) + "\n", encoding="utf-8")
    found = row_of(numbered, file_of(tmp_path, ITEMS + 3), str(mapping))
    assert found == {str(item): item + 1 for item in range(ITEMS)}


def test_a_list_of_ids_is_a_mapping_too(numbered, tmp_path):
    listed = tmp_path / "ids.txt"
    listed.write_text("".join(f"{item}\n" for item in reversed(range(ITEMS))))
    assert row_of(numbered, file_of(tmp_path), str(listed)) == {
        str(item): ITEMS - 1 - item for item in range(ITEMS)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,row\n0,0\n1,12\n", "line 3: row '12' of item '1'; expected a number from 0 to 11"),
        ("item,row\n0,0\n1,-1\n", "line 3: row '-1'"),
        ("item,row\n0,0\n1\n", "line 3: 1 fields"),
        ("item,row\n0,0\n0,1\n", "item '0' stands twice"),
        ("item,row\n0,5\n1,5\n", "row 5 is given to several items"),
        ("0\n1\n", "12 rows, but .* has 2 items"),
        ("item,row\nx,0\n", "no vector for any"),
        (None, "--feature-order .*no such file; expected numeric, source, dataset"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(numbered, tmp_path, text, message):
    mapping = tmp_path / "mapping.csv"
    if text is not None:
        mapping.write_text(text)
    with pytest.raises(DataError, match=message):
        read_features(numbered, file_of(tmp_path), order=str(mapping))


SHUFFLED = ["7", "10", "0", "9", "2", "11", "1"]


def from_recbole(folder: Path) -> RecBole:
    lines = "".join(f"u{item}\t{item}\n" for item in sorted(SHUFFLED))
    (folder / "x.inter").write_text("user_id:token\titem_id:token\n" + lines)
    titles = "".join(f"{item}\ttitle {item}\n" for item in SHUFFLED)
    (folder / "x.item").write_text("item_id:token\ttitle:token_seq\n" + titles)
    return RecBole(folder, folder / "data")


def from_parts(folder: Path) -> PreSplit:
    for part in ("train", "valid", "test"):
        lines = "".join(f"u,{item}\n" for item in SHUFFLED) if part == "train" else f"u,{SHUFFLED[0]}\n"
        (folder / f"{part}.csv").write_text("user,item\n" + lines)
    (folder / "items.csv").write_text("item,title\n" + "".join(f"{item},t\n" for item in SHUFFLED))
    return PreSplit(folder, folder / "data", items_file=folder / "items.csv")


def from_table(folder: Path) -> Table:
    (folder / "log.csv").write_text("user,item\n" + "".join(f"u,{item}\n" for item in sorted(SHUFFLED)))
    (folder / "items.csv").write_text("item,title\n" + "".join(f"{item},t\n" for item in SHUFFLED))
    return Table(folder / "log.csv", folder / "data", items_file=folder / "items.csv")


@pytest.mark.parametrize("reader", [from_recbole, from_parts, from_table])
def test_readers_keep_the_order_of_the_items_table(reader, tmp_path):
    dataset, _ = import_dataset(reader(tmp_path))
    assert dataset.items["item"].to_list() == sorted(SHUFFLED)
    path = file_of(tmp_path, len(SHUFFLED))
    assert row_of(dataset, path, "source") == {item: row for row, item in enumerate(SHUFFLED)}
    with pytest.raises(DataError, match="--feature-order with one of source"):
        read_features(dataset, path)


def test_an_item_that_the_source_did_not_list_has_no_row(tmp_path):
    reader = from_table(tmp_path)
    with (tmp_path / "log.csv").open("a") as log:
        log.write("u,unlisted\n")
    dataset, _ = import_dataset(reader)
    with pytest.raises(DataError, match=r"'unlisted' .* was not in the items table"):
        read_features(dataset, file_of(tmp_path, len(SHUFFLED) + 1), order="source")


def test_source_order_is_refused_where_the_source_has_none(numbered, tmp_path):
    with pytest.raises(DataError, match="does not keep the order of its source"):
        read_features(numbered, file_of(tmp_path), order="source")


def test_baby_gets_the_vectors_of_its_own_items(shared_data, tmp_path):
    """MMRec's Baby: item i has row i. In the order of items.parquet all but two would get another's."""
    source = shared_data("amazon-baby-interactions")
    dataset, _ = import_dataset(PreSplit(source, tmp_path / "baby"))
    path = file_of(tmp_path, len(dataset.items))
    by_number = row_of(dataset, path, "numeric")
    assert by_number == {str(item): item for item in range(7050)}
    wrong = sum(row != int(item) for item, row in row_of(dataset, path, "dataset").items())
    assert wrong == 7048

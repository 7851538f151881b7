"""MovieLens in the three layouts that GroupLens ships, written here byte for byte as the originals are."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from recllm.data.importing import import_dataset
from recllm.data.readers import MovieLens
from recllm.errors import DataError

JPEG = b"\xff\xd8\xff\xe0 not looked at by an import"


def test_ml_1m_is_read_as_latin_1(tmp_path: Path) -> None:
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "ratings.dat").write_bytes(
        b"1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978298413\n"
    )
    (folder / "movies.dat").write_bytes(
        "1193::One Flew Over the Cuckoo's Nest (1975)::Drama\n"
        "661::James and the Giant Peach (1996)::Animation|Children's|Musical\n"
        "73::Misérables, Les (1995)::Drama|Musical\n".encode("latin-1")
    )
    (folder / "users.dat").write_bytes(b"1::F::1::10::48067\n2::M::56::16::70072\n3::M::25::15::55117\n")
    dataset, findings = import_dataset(MovieLens(folder, tmp_path / "out"))
    assert dataset.interactions.select("user", "item", "timestamp", "rating").rows() == [
        ("1", "1193", 978300760, 5.0),
        ("1", "661", 978302109, 3.0),
        ("2", "1193", 978298413, 4.0),
    ]
    titles = dict(dataset.items.select("item", "title").rows())
    assert titles["73"] == "Misérables, Les (1995)"
    assert dataset.items.filter(item="661")["categories"][0].to_list() == [
        "Animation",
        "Children's",
        "Musical",
    ]
    assert dataset.users.rows() == [("1", "F", "1", "10", "48067"), ("2", "M", "56", "16", "70072")]
    assert dataset.manifest["source"]["layout"] == "ml-1m"
    assert "1 users of users.dat have no interaction" in findings.notes[0]


def test_ml_100k_has_24_columns_of_movies(tmp_path: Path) -> None:
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    (folder / "u.data").write_bytes(
        b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n196\t267\t5\t881250950\n"
    )
    (folder / "u.item").write_bytes(
        b"242|Kolya (1996)|24-Jan-1997||http://us.imdb.com/M/title-exact?Kolya%20(1996)|"
        b"0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        b"302|L.A. Confidential (1997)|01-Jan-1997||http://us.imdb.com/M/title-exact?L%2EA%2E+Confidential+(1997)|"
        b"0|0|0|0|0|0|1|0|0|0|1|0|0|1|0|0|1|0|0\n"
        b"267|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        b"543|Mis\xe9rables, Les (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?|"
        b"0|0|0|0|0|0|0|0|1|0|0|0|1|0|0|0|0|0|0\n"
    )
    (folder / "u.user").write_bytes(b"196|49|M|writer|55105\n186|39|F|executive|00000\n")
    dataset, findings = import_dataset(MovieLens(folder, tmp_path / "out"))
    assert len(dataset.interactions) == 3
    categories = dict(dataset.items.select("item", "categories").rows())
    assert categories["242"] == ["Comedy"]
    assert categories["302"] == ["Crime", "Film-Noir", "Mystery", "Thriller"]
    assert categories["267"] == []  # its one flag is "unknown"
    assert categories["543"] == ["Drama", "Musical"]
    assert dataset.items.filter(item="543")["title"][0] == "Misérables, Les (1995)"
    assert dataset.users.filter(user="186")["zip_code"][0] == "00000"
    assert not findings.left_out


def _latest(folder: Path) -> Path:
    folder.mkdir()
    (folder / "ratings.csv").write_bytes(
        b"userId,movieId,rating,timestamp\r\n1,1,4.0,964982703\r\n1,11,3.5,964981247\r\n2,1,0.5,1445714835\r\n"
    )
    (folder / "movies.csv").write_bytes(
        b"movieId,title,genres\r\n1,Toy Story (1995),Adventure|Animation\r\n"
        b'11,"American President, The (1995)",(no genres listed)\r\n'
    )
    (folder / "links.csv").write_bytes(b"movieId,imdbId,tmdbId\r\n1,0114709,862\r\n11,0112346,\r\n")
    return folder


def test_ml_latest_with_posters_and_plots(tmp_path: Path) -> None:
    folder = _latest(tmp_path / "ml-latest")
    (folder / "plots.csv").write_bytes(b'movieId,overview,director\n1,"Toys, alive",John Lasseter\n')
    (folder / "posters").mkdir()
    for name in ("1.jpg", "11.png", "777.jpg"):
        (folder / "posters" / name).write_bytes(JPEG)
    dataset, findings = import_dataset(MovieLens(folder, tmp_path / "out"))
    items = {row["item"]: row for row in dataset.items.iter_rows(named=True)}
    assert items["1"]["text"] == "Toys, alive" and items["11"]["text"] == ""
    assert items["1"]["images"] == ["images/1.jpg"] and items["11"]["images"] == ["images/11.png"]
    assert items["11"]["title"] == "American President, The (1995)" and items["11"]["categories"] == []
    assert items["1"]["imdbId"] == "0114709", "a leading zero is part of the id"
    assert items["11"]["tmdbId"] is None and items["1"]["director"] == "John Lasseter"
    assert any("1 of 3 images in posters belong to no item" in note for note in findings.notes)
    assert (tmp_path / "out" / "images" / "11.png").read_bytes() == JPEG


def test_a_title_in_another_encoding_is_kept_and_noted(tmp_path: Path) -> None:
    folder = _latest(tmp_path / "ml-latest")
    with (folder / "movies.csv").open("ab") as file:
        file.write(b"12,Mis\xe9rables,Drama\r\n")
    dataset, findings = import_dataset(MovieLens(folder, tmp_path / "out"))
    assert dataset.items.filter(item="12")["title"][0] == "Mis\ufffdrables"
    assert any("movies.csv: 1 lines have bytes that are not utf-8" in note for note in findings.notes)
    assert dataset.items["imdbId"].drop_nulls().len() == 2


def test_a_folder_that_is_none_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"ratings\.csv or ratings\.dat or u\.data\); the folder holds: notes\.txt"
    ):
        import_dataset(MovieLens(tmp_path, tmp_path / "out"))
    folder = _latest(tmp_path / "ml")
    (folder / "movies.csv").unlink()
    with pytest.raises(
        DataError, match=r"movies\.csv: no such file; .*the folder holds: links\.csv, ratings\.csv"
    ):
        import_dataset(MovieLens(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_missing_column_is_named_with_those_found(tmp_path: Path) -> None:
    folder = _latest(tmp_path / "ml")
    (folder / "ratings.csv").write_text("user,movieId,rating,timestamp\n1,1,4.0,964982703\n")
    with pytest.raises(DataError, match="missing column 'userId'; found: user, movieId, rating, timestamp"):
        import_dataset(MovieLens(folder, tmp_path / "out"))


def test_items_that_only_ratings_know_are_kept_or_dropped(tmp_path: Path) -> None:
    folder = _latest(tmp_path / "ml")
    with (folder / "ratings.csv").open("ab") as file:
        file.write(b"2,99999,5.0,1445714836\r\n")
    kept, findings = import_dataset(MovieLens(folder, tmp_path / "kept"))
    assert kept.items.filter(item="99999")["title"][0] == ""
    assert any("1 items are not in the items table" in note for note in findings.notes)
    dropped, findings = import_dataset(MovieLens(folder, tmp_path / "dropped", unknown_items="drop"))
    assert len(dropped.interactions) == 3 and "99999" not in dropped.items["item"]
    assert findings.left_out == {"interactions with items that the items table lacks": 1}
    assert dropped.scan_interactions().select(pl.col("rating").count()).collect().item() == 3

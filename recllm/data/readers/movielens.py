"""MovieLens as GroupLens ships it: ml-latest*, ml-25m, ml-1m and ml-100k, with posters and plots if given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from recllm.data.raw.delimited import read_delimited
from recllm.data.raw.findings import Findings
from recllm.data.raw.joining import collected, find_images
from recllm.data.raw.tables import LINE, RawDataset, RawTable, find_file, require_columns
from recllm.data.readers.options import ImportOptions

NO_GENRES = "(no genres listed)"
GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


@dataclass
class MovieLens(ImportOptions):
    """Imports a MovieLens folder (ml-latest*, ml-20m, ml-25m, ml-32m, ml-1m or ml-100k)."""

    posters: Path | None = None
    """Folder with one image a movie, named by its id (`1246.jpg`); by default SOURCE/posters if it exists."""
    plots: Path | None = None
    """CSV with `movieId`, `overview` and more columns; by default SOURCE/plots.csv where it exists."""

    def read(self, findings: Findings, workspace: Path) -> RawDataset:
        """Reads the layout that the folder's files show."""
        for name, read in (("ratings.csv", _read_latest), ("ratings.dat", _read_1m), ("u.data", _read_100k)):
            if (self.source / name).is_file():
                raw = read(self.source, findings, workspace)
                break
        else:
            find_file(self.source, "ratings.csv", "ratings.dat", "u.data", what="MovieLens ratings file")
        self._add_plots(raw.items, findings, workspace)
        self._add_posters(raw)
        return raw

    def _add_plots(self, items: RawTable, findings: Findings, workspace: Path) -> None:
        path = self.plots or self.source / "plots.csv"
        if self.plots is None and not path.is_file():
            return
        table = read_delimited(path, findings, workspace)
        require_columns(path, table.frame.collect_schema(), ["movieId", "overview"])
        frame = (
            collected(table).frame.drop(LINE, strict=False).rename({"movieId": "item", "overview": "text"})
        )
        frame = frame.unique("item", keep="first", maintain_order=True)
        items.frame = items.frame.join(frame, on="item", how="left", maintain_order="left")

    def _add_posters(self, raw: RawDataset) -> None:
        folder = self.posters or self.source / "posters"
        if self.posters is None and not folder.is_dir():
            return
        find_images(raw, folder)


def _read_latest(folder: Path, findings: Findings, workspace: Path) -> RawDataset:
    names = {"userId": "user", "movieId": "item", "rating": "rating", "timestamp": "timestamp"}
    ratings = _renamed(read_delimited(folder / "ratings.csv", findings, workspace), names)
    movies = read_delimited(folder / "movies.csv", findings, workspace)
    movies = collected(_renamed(movies, {"movieId": "item", "title": "title", "genres": "genres"}))
    movies.frame = movies.frame.with_columns(_genres()).drop("genres")
    if (folder / "links.csv").is_file():
        links = collected(read_delimited(folder / "links.csv", findings, workspace))
        require_columns(links.path, links.frame.collect_schema(), ["movieId"])
        links = (
            links.frame.drop(LINE, strict=False)
            .rename({"movieId": "item"})
            .unique("item", keep="first", maintain_order=True)
        )
        movies.frame = movies.frame.join(links, on="item", how="left", maintain_order="left")
    return RawDataset(ratings, movies, source={"layout": "ml-latest"})


def _read_1m(folder: Path, findings: Findings, workspace: Path) -> RawDataset:
    def read(name: str, header: list[str]) -> RawTable:
        return read_delimited(
            folder / name, findings, workspace, separator="::", quote=None, header=header, encoding="latin-1"
        )

    ratings = read("ratings.dat", ["user", "item", "rating", "timestamp"])
    movies = read("movies.dat", ["item", "title", "genres"])
    movies.frame = movies.frame.with_columns(_genres()).drop("genres")
    users = None
    if (folder / "users.dat").is_file():
        users = read("users.dat", ["user", "gender", "age", "occupation", "zip_code"])
    return RawDataset(ratings, movies, users, source={"layout": "ml-1m"})


def _read_100k(folder: Path, findings: Findings, workspace: Path) -> RawDataset:
    def read(name: str, separator: str, header: list[str]) -> RawTable:
        return read_delimited(
            folder / name,
            findings,
            workspace,
            separator=separator,
            quote=None,
            header=header,
            encoding="latin-1",
        )

    ratings = read("u.data", "\t", ["user", "item", "rating", "timestamp"])
    movies = read("u.item", "|", ["item", "title", "released", "video_released", "imdb_url", *GENRES_100K])
    genres = [pl.when(pl.col(name) == "1").then(pl.lit(name)) for name in GENRES_100K[1:]]
    movies.frame = movies.frame.with_columns(pl.concat_list(genres).list.drop_nulls().alias("categories"))
    movies.frame = movies.frame.drop(GENRES_100K)
    users = None
    if (folder / "u.user").is_file():
        users = read("u.user", "|", ["user", "age", "gender", "occupation", "zip_code"])
    return RawDataset(ratings, movies, users, source={"layout": "ml-100k"})


def _renamed(table: RawTable, names: dict[str, str]) -> RawTable:
    require_columns(table.path, table.frame.collect_schema(), names)
    exactly = table.with_lines
    again = (lambda: exactly().rename(names)) if exactly is not None else None
    return RawTable(table.path, table.frame.rename(names), again)


def _genres() -> pl.Expr:
    listed = pl.when(pl.col("genres") != NO_GENRES).then(pl.col("genres").str.split("|"))
    return listed.fill_null([]).alias("categories")

"""Mutations of valid files: each reader gives a dataset or a `DataError`, never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from recllm.data.importing import import_dataset
from recllm.data.readers import Amazon, ItemSequences, MicroLens, MovieLens, PreSplit, RecBole, Table, Yelp
from recllm.errors import DataError
from tests.data.imports import put

ROUNDS = 40
REVIEW = {
    "reviewerID": "U1",
    "asin": "A1",
    "overall": 5.0,
    "verified": True,
    "reviewText": "ok",
    "helpful": [1, 2],
}
FILES = {
    Amazon: {
        "X_5.json": "\n".join(
            json.dumps({**REVIEW, "asin": f"A{n}", "unixReviewTime": 1500000000}) for n in range(4)
        ),
        "meta_X.json": "\n".join(
            json.dumps({"asin": f"A{n}", "title": "T", "categories": [["a"]]}) for n in range(4)
        ),
    },
    Table: {
        "log.csv": 'user,item,timestamp,rating\nu1,a,2011-01-01,5\nu2,b,2012-01-01,"4,5"\nu3,c,,1\n',
        "items.jsonl": '{"item": "a", "title": "A", "categories": ["x", "y"]}\n{"item": "b", "price": 1.5}\n',
    },
    RecBole: {
        "x.inter": "user_id:token\titem_id:token\trating:float\tlist:float_seq\n1\ta\t4\t1 2\n2\tb\t5\t3\n",
        "x.item": "item_id:token\tname:token_seq\tclass:token_seq\na\tA b\tx y\nb\tB\t'x', 'y z'\n",
    },
    Yelp: {
        "review.json": '{"user_id": "u", "business_id": "b", "stars": 4, "date": "2015-01-01", "useful": 1}\n'
        * 2,
        "business.json": '{"business_id": "b", "name": "Shop", "categories": "Food, Bars", "is_open": 1}\n',
        "user.json": '{"user_id": "u", "name": "N"}\n',
    },
    MovieLens: {
        "ratings.csv": "userId,movieId,rating,timestamp\n1,10,4.0,964982703\n2,20,5.0,964982704\n",
        "movies.csv": 'movieId,title,genres\n10,"A, the (1995)",X|Y\n20,B,(no genres listed)\n',
    },
    MicroLens: {
        "M_pairs.csv": "user,item,timestamp\n1,10,1583378629552\n2,20,1583378629553\n",
        "M_titles.csv": "item,title\n10,A\n20,B, c\n",
        "M_likes_and_views.txt": "10\t3\t2.5K\n20\t4\t5\n",
    },
    PreSplit: {name: "user,item\n1,a\n2,b\n" for name in ("train.csv", "valid.csv", "test.csv")},
    ItemSequences: {"sequences.txt": "1 a b c\n2 b d\n", "items.csv": "item,title\na,A\nb,B\n"},
}
PIECES = [
    *(
        b"",
        b"\0",
        b'"',
        b"\n",
        b"\r",
        b"\t",
        b",",
        b"[",
        b"}",
        b"null",
        b"NaN",
        b"true",
        b"{}",
        b"[[1]]",
        b"-1",
    ),
    *(
        b"9" * 30,
        b"1e999",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b'"\\ud800"',
        b"0.0",
        b"PK\x03\x04",
        b"\x1f\x8b",
    ),
]


def mutated(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Returns bytes with one to four changes (pieces put in, cut out, repeated), or another kind of file."""
    if rng.random() < 0.1:
        return rng.choice(others)
    for _ in range(rng.randrange(1, 5)):
        begin = rng.randrange(len(data) + 1)
        end = min(len(data), begin + rng.choice((0, 0, 1, 3, 20)))
        piece = rng.choice([*PIECES, data[begin : begin + 30], rng.choice(others)[:40]])
        data = data[:begin] + piece + data[end:]
    return data


@pytest.mark.parametrize("reader", FILES, ids=lambda reader: reader.__name__)
def test_mutated_files_give_a_dataset_or_a_data_error(tmp_path: Path, reader: type) -> None:
    rng = random.Random(0)
    files = {name: text.encode() for name, text in FILES[reader].items()}
    others = [text.encode() for held in FILES.values() for text in held.values()]
    imported = 0
    for number in range(ROUNDS):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        changed = rng.choice([*files])
        for name, data in files.items():
            put(tmp_path / "in" / name, mutated(rng, data, others) if name == changed and number else data)
        source = tmp_path / "in" / (next(iter(files)) if reader in (Amazon, Table) else "")
        given = {"items_file": tmp_path / "in" / "items.jsonl"} if reader is Table else {}
        try:
            import_dataset(reader(source, tmp_path / "out", overwrite=True, **given))
            imported += 1
        except DataError as error:
            assert len(str(error)) < 4000
        except Exception as error:
            content = (tmp_path / "in" / changed).read_bytes()
            raise AssertionError(f"round {number}, {changed}: {content!r}") from error
    assert imported

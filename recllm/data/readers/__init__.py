"""One reader a source: a dataclass of options whose `read` returns the source's tables."""

from recllm.data.raw.findings import Findings
from recllm.data.readers.amazon import Amazon
from recllm.data.readers.item_sequences import ItemSequences
from recllm.data.readers.microlens import MicroLens
from recllm.data.readers.movielens import MovieLens
from recllm.data.readers.options import ImportOptions
from recllm.data.readers.presplit import PreSplit
from recllm.data.readers.recbole import RecBole
from recllm.data.readers.table import Table
from recllm.data.readers.yelp import Yelp

READERS: dict[str, type[ImportOptions]] = {
    "table": Table,
    "movielens": MovieLens,
    "amazon": Amazon,
    "microlens": MicroLens,
    "yelp": Yelp,
    "recbole": RecBole,
    "sequences": ItemSequences,
    "presplit": PreSplit,
}

__all__ = [
    "READERS",
    "Amazon",
    "Findings",
    "ImportOptions",
    "ItemSequences",
    "MicroLens",
    "MovieLens",
    "PreSplit",
    "RecBole",
    "Table",
    "Yelp",
]

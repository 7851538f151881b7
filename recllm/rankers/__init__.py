"""Discriminative recommenders, one file each: `from recllm.rankers import SASRec`.

Classes are imported when they are first asked for, so that commands which need none start fast.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from recllm.errors import DataError

RANKERS: dict[str, tuple[str, str]] = {
    "sasrec": ("recllm.rankers.models.sasrec", "SASRec"),
    "bert4rec": ("recllm.rankers.models.bert4rec", "BERT4Rec"),
    "gru4rec": ("recllm.rankers.models.gru4rec", "GRU4Rec"),
    "stosa": ("recllm.rankers.models.stosa", "STOSA"),
    "unisrec": ("recllm.rankers.models.unisrec", "UniSRec"),
    "missrec": ("recllm.rankers.models.missrec", "MISSRec"),
    "m3srec": ("recllm.rankers.models.m3srec", "M3SRec"),
    "stosa_m3": ("recllm.rankers.models.stosa_m3", "STOSAM3"),
    "hm4sr": ("recllm.rankers.models.hm4sr", "HM4SR"),
    "mmsr": ("recllm.rankers.models.mmsr", "MMSR"),
    "mmsbr": ("recllm.rankers.models.mmsbr", "MMSBR"),
    "profile_fusion": ("recllm.rankers.models.profile_fusion", "ProfileFusion"),
    "bpr": ("recllm.rankers.models.bpr", "BPR"),
    "vbpr": ("recllm.rankers.models.vbpr", "VBPR"),
    "lightgcn": ("recllm.rankers.models.lightgcn", "LightGCN"),
    "mmgcn": ("recllm.rankers.models.mmgcn", "MMGCN"),
    "lattice": ("recllm.rankers.models.lattice", "LATTICE"),
    "freedom": ("recllm.rankers.models.freedom", "FREEDOM"),
    "smore": ("recllm.rankers.models.smore", "SMORE"),
    "mllmrec": ("recllm.rankers.models.mllmrec", "MLLMRec"),
}
"""The trained rankers: name -> (module, class)."""

__all__ = ["RANKERS", "Popularity", "ranker_class", *(name for _, name in RANKERS.values())]


def ranker_class(name: str) -> Any:
    """Returns a ranker's class.

    Raises:
        DataError: There is none of that name; the nearest one is named.
    """
    if name not in RANKERS:
        (near,) = difflib.get_close_matches(name, RANKERS, n=1, cutoff=0.0)
        raise DataError(f"no ranker is called {name!r}; the nearest is {near!r} of {', '.join(RANKERS)}")
    module, attribute = RANKERS[name]
    return getattr(importlib.import_module(module), attribute)


def __getattr__(name: str) -> Any:
    if name == "Popularity":
        return importlib.import_module("recllm.rankers.models.popularity").Popularity
    for module, attribute in RANKERS.values():
        if attribute == name:
            return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

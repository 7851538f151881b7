"""Discriminative recommenders, one file each."""

from recllm.rankers.popularity import Popularity

__all__ = ["Popularity"]

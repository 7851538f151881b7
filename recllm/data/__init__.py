"""Datasets on disk and what is cut from them: filters, splits, candidates, sequences, and the toy world."""

from recllm.data.dataset import Dataset, write_dataset

__all__ = ["Dataset", "write_dataset"]

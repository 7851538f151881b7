"""Multimodal LLMs: loading them by name, images and their tokens, generation with a store of its results."""

from recllm.mllm.loading import LoadedModel, LoadOptions, load

__all__ = ["LoadOptions", "LoadedModel", "load"]

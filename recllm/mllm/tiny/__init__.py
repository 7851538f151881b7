"""The embedded model: a real Qwen2-VL, small enough to be trained in minutes where it is used.

`ensure()` returns the folder of a checkpoint that describes toy-world pictures and follows the builders'
prompts; nothing in recllm asks whether a model is this one. `random_model` and `build_random` make models of
any size with random weights, for measuring speed.
"""

from __future__ import annotations

from recllm.mllm.tiny.architecture import SHAPES, Shape, build_random, random_model
from recllm.mllm.tiny.cache import cache_folder, ensure, fingerprint

__all__ = ["SHAPES", "Shape", "build_random", "cache_folder", "ensure", "fingerprint", "random_model"]

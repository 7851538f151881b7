"""The embedded model: a real Qwen2-VL of 1.8 million parameters that comes with the package.

`checkpoint_folder()` returns a checkpoint that describes toy-world pictures and follows the builders'
prompts; nothing in recllm asks whether a model is this one. `train_checkpoint` makes it again. `random_model`
and `build_random` make models of any size with random weights, for measuring speed.
"""

from __future__ import annotations

from recllm.mllm.tiny.architecture import SHAPES, Shape, build_random, random_model
from recllm.mllm.tiny.checkpoint import checkpoint_folder, train_checkpoint

__all__ = ["SHAPES", "Shape", "build_random", "checkpoint_folder", "random_model", "train_checkpoint"]

"""The toy world: a generated dataset in which it is known what sight, memory and reading are worth."""

from recllm.data.toyworld.config import ToyworldConfig, write_toyworld
from recllm.data.toyworld.images import COLORS, PATTERNS, SHAPES, render
from recllm.data.toyworld.observers import OBSERVERS, observer_scores
from recllm.data.toyworld.parameters import Parameters
from recllm.data.toyworld.world import ToyWorld, generate

__all__ = [
    "COLORS",
    "OBSERVERS",
    "PATTERNS",
    "SHAPES",
    "Parameters",
    "ToyWorld",
    "ToyworldConfig",
    "generate",
    "observer_scores",
    "render",
    "write_toyworld",
]

"""recllm: the toolkit that makes multimodal LLMs recommend.

The rooms: `recllm.data` (datasets, splits, candidates, sequences), `recllm.evaluation` (rank records,
metrics, significance) and `recllm.rankers`. Nothing heavy is imported here.
"""

__version__ = "0.1.0"

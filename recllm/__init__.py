"""recllm: the toolkit that makes multimodal LLMs recommend.

The rooms: `recllm.data` (datasets, splits, candidates, sequences), `recllm.evaluation` (rank records,
metrics, significance) and `recllm.rankers`. Nothing heavy is imported here.
"""

import os

__version__ = "0.1.0"

# OpenMP reads this once, when torch is imported. By default its threads spin at barriers; beside other work
# on the same cores they then wait for a thread that has no core, and training takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

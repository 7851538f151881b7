"""recllm: the toolkit that makes multimodal LLMs recommend.

The rooms: `recllm.data` (datasets, splits, candidates, sequences), `recllm.evaluation` (rank records,
metrics, significance) and `recllm.rankers`. Nothing heavy is imported here.
"""

import os

__version__ = "0.1.0"

# OpenMP reads this once, when torch is imported. By default its threads spin at barriers for a long time;
# beside other work they then wait for a thread that has no core. A short spin costs nothing otherwise.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

"""Ranks the whole catalog in two stages: a first stage's top K, in the order of new scores.

python eval/rerank.py ranks/profile-catalog.parquet topk/profile-catalog.parquet scores/mllm.parquet \\
    --out ranks/two-stage.parquet
"""

from recllm.config import run_command
from recllm.retrieval.commands import RerankOptions, rerank

if __name__ == "__main__":
    run_command(RerankOptions, rerank)

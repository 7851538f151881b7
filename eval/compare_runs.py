"""Compares the first system with each of the others, paired by user.

python eval/compare_runs.py ranks/ours.parquet ranks/sasrec.parquet --metrics ndcg@10 auc
python eval/compare_runs.py scores/*.parquet --candidates test.parquet --out reports/main
"""

from recllm.config import run_command
from recllm.evaluation.commands import CompareRunsConfig, compare_runs

if __name__ == "__main__":
    run_command(CompareRunsConfig, compare_runs)

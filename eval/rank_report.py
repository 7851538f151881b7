"""Measures systems and prints one table.

python eval/rank_report.py scores/*.parquet --candidates DATASET/splits/loo/candidates/1+20/test.parquet
python eval/rank_report.py ranks/*.parquet --ks 10 --out reports/main
"""

from recllm.config import run_command
from recllm.evaluation.commands import RankReportConfig, rank_report

if __name__ == "__main__":
    run_command(RankReportConfig, rank_report)

"""Evaluation: rank records, exact metrics, significance and what lists and probabilities tell beyond them.

records = rank_candidates(candidates, scores)       # or rank_catalog, rank_score_matrix, RankRecords.load
compute_metrics(records, ks=(5, 10)).mean()         # {'hr@5': ..., 'ndcg@10': ..., 'auc': ...}
compare(records, other_records, names=["ndcg@10"])
"""

from recllm.data.candidate_files import Candidates
from recllm.evaluation.diagnostics import (
    Calibration,
    brier,
    calibration,
    catalog_coverage,
    gini_exposure,
    intra_list_diversity,
    log_loss,
    novelty,
)
from recllm.evaluation.full_ranking import rank_catalog, rank_full, top_k
from recllm.evaluation.inputs import System, read_system, read_systems
from recllm.evaluation.metrics import METRICS, Metrics, compute_metrics, metric_names, pooled_auc
from recllm.evaluation.ranks import RankRecords, rank_candidates, rank_score_matrix
from recllm.evaluation.significance import Comparison, bootstrap_means, compare, holm, sign_flip_test

__all__ = [
    "METRICS",
    "Calibration",
    "Candidates",
    "Comparison",
    "Metrics",
    "RankRecords",
    "System",
    "bootstrap_means",
    "brier",
    "calibration",
    "catalog_coverage",
    "compare",
    "compute_metrics",
    "gini_exposure",
    "holm",
    "intra_list_diversity",
    "log_loss",
    "metric_names",
    "novelty",
    "pooled_auc",
    "rank_candidates",
    "rank_catalog",
    "rank_full",
    "rank_score_matrix",
    "read_system",
    "read_systems",
    "sign_flip_test",
    "top_k",
]

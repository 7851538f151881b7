"""recllm's ranking metrics as a Hugging Face `evaluate` metric.

metric = evaluate.load("<repo>/eval/metrics/ranking")
metric.compute(predictions=scores, references=labels, queries=users, ks=[5, 10])
"""

from numbers import Integral

import datasets
import evaluate
import polars as pl

from recllm.evaluation import compute_metrics, pooled_auc, rank_candidates

_DESCRIPTION = """HR, Recall, Precision, NDCG, MRR and MAP at cutoffs, MRR, MAP and AUC of whole lists, and
pooled AUC. Each is the exact expected value when ties are broken uniformly at random; `tie_rate` is the share
of the positives that tie with a negative."""

_INPUTS = """
Args:
    predictions: one finite score per row, higher is better.
    references: 1 for a positive, 0 for a negative.
    queries: the list (user) that each row belongs to, text or integers; a list needs at least one positive.
    ks: cutoffs, 5, 10 and 20 when not given; one number for one cutoff.
Returns:
    A dictionary of floats: the means over lists, `pooled_auc` and `tie_rate`. AUC without negatives is NaN.
"""


class Ranking(evaluate.Metric):
    """One row per candidate; the order of the rows does not matter."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"predictions": "float64", "references": "int8"}
        formats = [{**kinds, "queries": queries} for queries in ("string", "int64")]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({name: datasets.Value(kind) for name, kind in each.items()})
                for each in formats
            ],
        )

    def _compute(self, predictions, references, queries, ks=(5, 10, 20)) -> dict[str, float]:
        rows = pl.DataFrame({"user": queries, "label": references, "score": predictions}).with_row_index(
            "item"
        )
        records = rank_candidates(rows.drop("score"), rows.drop("label"))
        metrics = compute_metrics(records, (ks,) if isinstance(ks, Integral) else ks)
        both = 0 < sum(references) < len(references)
        pooled = pooled_auc(rows["score"].to_numpy(), rows["label"].to_numpy()) if both else float("nan")
        return {**metrics.mean(), "pooled_auc": pooled, "tie_rate": metrics.tie_rate}

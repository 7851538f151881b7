"""The README's tables of what the rankers reach, beside published figures of the same protocol.

Measured figures come from `results/rankers_*.json`, published ones from `results/published.json`. A published
figure appears only beside a measured one of the same mask. A figure whose source does not say what it masks
has a column of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from measured import results, table

NAMES = {
    "popularity": "Popularity",
    "bpr": "BPR",
    "vbpr": "VBPR",
    "lightgcn": "LightGCN",
    "mmgcn": "MMGCN",
    "lattice": "LATTICE",
    "freedom": "FREEDOM",
    "smore": "SMORE",
    "mllmrec": "MLLMRec",
    "gru4rec": "GRU4Rec",
    "sasrec": "SASRec",
    "bert4rec": "BERT4Rec",
    "stosa": "STOSA",
    "stosa_m3": "M3SRec",  # the published tables call it so
    "unisrec": "UniSRec",
    "missrec": "MISSRec",
    "mmsr": "MMSR",
    "mmsbr": "MMSBR",
    "m3srec": None,  # no figures of this model have been published
    "hm4sr": "HM4SR",
    "profile_fusion": None,  # VLM4Rec's fusions: their figures are of another protocol
}
"""Each ranker's name in published tables, in the order of the README's table of rankers: by family."""
ABOUT = 0.02
"""Relative difference up to which a measured mean counts as about equal to a published one."""
NOT_STATED = "published, protocol not stated"


class Published(NamedTuple):
    """A published figure.

    Attributes:
        values: One for each metric asked for.
        source: Who published it.
        masked: What it masks; None where the source does not say.
    """

    values: tuple[float, ...]
    source: str
    masked: str | None

    def __str__(self) -> str:
        return " / ".join(f"{value:.4f}" for value in self.values) + f" ({self.source})"


def published(dataset: str, ranker: str, metrics: tuple[str, ...], masked: str | None) -> Published | None:
    """Returns the best published figure of a ranker, by the first metric; None where none is known.

    Cells that are copying errors count with their right values.

    Args:
        dataset: A dataset of `results/published.json`.
        ranker: A name of `NAMES`.
        metrics: As in the results.
        masked: Take only figures that mask the same; None takes those whose sources do not say.
    """
    found = []
    for each in results("published")["tables"]:
        if each["dataset"] != dataset or each["masked"] != masked or NAMES[ranker] not in each["rows"]:
            continue
        row = dict(zip(each["metrics"], each["rows"][NAMES[ranker]], strict=True))
        for error in each["errors"]:
            if error["row"] == NAMES[ranker]:
                row |= dict(zip(error["metrics"], error["right"], strict=True))
        if all(row.get(metric) is not None for metric in metrics):
            values = tuple(row[metric] for metric in metrics)
            found.append(Published(values, each["source"], masked))
    return max(found, key=lambda figure: figure.values[0], default=None)


def rankers_beauty() -> str:
    """Rankers on Beauty: test lists over the whole catalog, seen items masked and not."""
    metrics = ("recall@10", "ndcg@10")
    heads = {"seen": ("R@10, masked", "N@10, masked"), "none": ("R@10, unmasked", "N@10, unmasked")}
    columns = {"seen": "published, masked", "none": "published, unmasked"}
    return _beside_published("beauty", metrics, heads, columns)


def rankers_baby() -> str:
    """Rankers on Baby: test lists over the whole catalog, training items masked."""
    heads = {"train": ("R@20", "N@20")}
    return _beside_published("baby", ("recall@20", "ndcg@20"), heads, {"train": "published"})


def rankers_movielens() -> str:
    """Rankers on MovieLens: 1+20 lists, and the whole catalog, with intervals over users."""
    listed, whole = "1+20-uniform-seed42", "seen"
    rows = [["ranker", "AUC, 1+20", "HR@5, 1+20", "NDCG@10, 1+20", "R@10, catalog", "N@10, catalog"]]
    figures = by_family(results("rankers_movielens")["figures"])
    for ranker, line in figures.items():
        found = [figure(line["test"][listed][name], 3) for name in ("auc", "hr@5", "ndcg@10")]
        found += [figure(line["test"][whole][name], 3) for name in ("recall@10", "ndcg@10")]
        rows.append([f"`{ranker}`", *found])
    return table(rows) + "\n" + caption(figures)


def by_family(figures: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures in the order of `NAMES`."""
    return {ranker: figures[ranker] for ranker in NAMES if ranker in figures}


def caption(figures: dict[str, Any]) -> str:
    """Says which rankers were tuned, and where image features come from."""
    trained = {ranker: line for ranker, line in figures.items() if "tuned" in line}
    tuned = [f"`{ranker}` ({line['tuned_options']})" for ranker, line in trained.items() if line["tuned"]]
    count = f"{len(tuned) or 'None'} of the {len(trained)} rankers"
    verb = "was" if len(tuned) < 2 else "were"
    if tuned:
        text = f"{count} {verb} tuned on this dataset's validation lists: {', '.join(tuned)}. "
        text += "The others run with "
    else:
        text = f"{count} {verb} tuned on this dataset: all run with "
    text += (
        "their recipes' settings. So the table is in the order of the families above and does not rank the "
    )
    text += "rankers.\n"
    images: dict[str, list[str]] = {}
    for ranker, line in trained.items():
        if "images" in line:
            images.setdefault(line["images"], []).append(f"`{ranker}`")
    for source, rankers in images.items():
        text += f"Image features of {', '.join(rankers)}: {source}.\n"
    return text


def figure(line: dict[str, float], digits: int = 4) -> str:
    """A mean with its deviation over seeds, or its interval over users."""
    mean = f"{line['mean']:.{digits}f}"
    if "sd" in line:
        return f"{mean} ± {line['sd']:.{digits}f}"
    return f"{mean} [{line['low']:.{digits}f}, {line['high']:.{digits}f}]"


def _beside_published(
    dataset: str, metrics: tuple[str, str], heads: dict[str, tuple[str, str]], columns: dict[str, str]
) -> str:
    """Returns a table whose published columns follow the measured ones of the same mask.

    Args:
        dataset: Which results.
        metrics: Two names.
        heads: For each mask the heads of its two measured columns.
        columns: For each mask the head of its published column.
    """
    figures = by_family(results(f"rankers_{dataset}")["figures"])
    known = {
        mask: {ranker: published(dataset, ranker, metrics, mask) for ranker in figures}
        for mask in (*heads, None)
    }
    shown = {
        mask: any(found.values()) for mask, found in known.items()
    }  # a column without a figure is left out
    head = ["ranker", "seeds"]
    for mask, names in heads.items():
        head += [*names, columns[mask]] if shown[mask] else [*names]
    rows = [head + [NOT_STATED] * shown[None]]
    for ranker, line in figures.items():
        name = "`" + " ".join([ranker, *line.get("flags", [])]) + "`"
        row = [name, str(len(line.get("seeds", [])) or "")]
        for mask in heads:
            row += [figure(line["test"][mask][metric]) for metric in metrics]
            row += [str(known[mask][ranker] or "")] * shown[mask]
        rows.append(row + [str(known[None][ranker] or "")] * shown[None])
        if wider := line["test"].get("known-graph"):  # no published figure is known to have used this graph
            measured = [figure(wider[metric]) for metric in metrics]
            filled = [f"{name}, `--graph known`", row[1], *measured]
            rows.append(filled + [""] * (len(rows[0]) - len(filled)))
    text = caption(figures)
    for mask, names in heads.items():
        if not shown[mask]:
            masked = names[0].partition(", ")[2]
            text += f"We know of no published {masked} figure of these rankers"
            text += f"{_others(dataset, metrics, mask)}.\n"
    for mask in heads:
        for ranker, found in known[mask].items():
            if found:
                line = [figures[ranker]["test"][mask][metric]["mean"] for metric in metrics]
                text += f"`{ranker}` is {compared(line, found)}.\n"
    return table(rows) + "\n" + text


def compared(measured: list[float], found: Published) -> str:
    """Says how measured means compare with published ones that mask the same: both metrics must agree."""
    ratios = [mean / value for mean, value in zip(measured, found.values, strict=True)]
    ours = " / ".join(f"{mean:.4f}" for mean in measured)
    if all(abs(ratio - 1) <= ABOUT for ratio in ratios):
        word = "about equal to"
    elif all(ratio > 1 for ratio in ratios):
        word = "above"
    elif all(ratio < 1 for ratio in ratios):
        word = "below"
    else:
        word = "in one metric above and in one below"
    what = {"none": "unmasked", "seen": "masked", "train": "training items masked"}[found.masked]
    return f"{word} the published figure, {what}: {ours} against {found}"


def _others(dataset: str, metrics: tuple[str, ...], mask: str) -> str:
    """Names models that are no rankers of ours, but have been published with this mask."""
    rows = [
        (name, each)
        for each in results("published")["tables"]
        if each["dataset"] == dataset and each["masked"] == mask
        for name in each["rows"]
    ]
    if not rows:
        return ""
    name, each = max(rows, key=lambda row: row[1]["rows"][row[0]][row[1]["metrics"].index(metrics[0])])
    values = dict(zip(each["metrics"], each["rows"][name], strict=True))
    shown = " / ".join(f"{values[metric]:.4f}" for metric in metrics)
    return f"; {name}, which is not one of them, has {shown} ({each['source']})"

"""Scoring a user's candidates: the shared-prefix scorer against whole prompts and `model(**inputs).logits`.

    python benchmarks/scoring.py

The model is a Qwen2-VL with random weights (language model of 8 layers and width 256), float32; prompts are
random tokens, of which a user's candidates share a history of H tokens and have C of their own. `ours` is
`YesNoScorer` from tokens to margins; `one by one` and `batched` put each candidate's whole prompt through
`model(**inputs).logits`, alone or 10 at a time, and read the margin at the last position. Rounds are
interleaved, figures are medians; every contender must give the same margins within 1e-4. `bound` is the ratio
of token counts, N(H + C) / (H + NC). In bfloat16, where both round, `rank_correlation` is Spearman's between
the margins of the main setting: shared against whole prompts, and each against float32.

    python benchmarks/scoring.py --smoke     two small settings, nothing written

Writes results/scoring.json, and results/scoring.svg, a plot of the ratios.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from recllm.files import write_json
from recllm.mllm.loading import load
from recllm.mllm.prefix.groups import Prompt
from recllm.mllm.scoring import YesNoScorer
from recllm.mllm.tiny.architecture import Shape, build_random
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "scoring.json"
PLOT = RESULTS.with_suffix(".svg")
SMOKE = "--smoke" in sys.argv
SHAPE = Shape(layers=8, hidden=256, intermediate=1024, heads=8, kv_heads=4, rope_sections=(4, 6, 6))
MAIN = (1000, 40, 50)
GRID = [(history, 40, count) for history in (100, 300, 1000) for count in (2, 5, 21, 50)]
GRID += [(3000, 40, count) for count in (2, 5)]  # more of them take minutes one by one
SETTINGS = [(60, 10, 3), (100, 40, 5)] if SMOKE else [MAIN, *GRID]
ROUNDS = {True: 1 if SMOKE else 3, False: 1 if SMOKE else 2}  # of the main setting, and of the grid
TOGETHER = 10


def make_prompts(history: int, candidate: int, count: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    shared = rng.integers(300, 1000, history)
    prompts = []
    for row in range(count):
        tokens = np.concatenate([shared, rng.integers(300, 1000, candidate)])
        prompts.append(Prompt(row, str(row), tokens, tokens, (), np.zeros(0, np.int64)))
    return prompts


def contenders(loaded, scorer, session, prompts):
    yes, no = list(scorer.answers.yes), list(scorer.answers.no)
    tokens = torch.from_numpy(np.stack([prompt.tokens for prompt in prompts]))

    def ours():
        margins = torch.empty(len(prompts))
        for scored in session.score([lambda: [prompts]], {}):
            margins[scored.rows] = torch.from_numpy(scored.margin)
        return margins

    def full(together):
        margins = []
        with torch.inference_mode():
            for part in tokens.split(together):
                inputs = {"input_ids": part, "attention_mask": torch.ones_like(part)}
                logits = loaded.model(**inputs).logits[:, -1]
                margins.append(logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1))
        return torch.cat(margins)

    return {"ours": ours, "batched": lambda: full(TOGETHER), "one by one": lambda: full(1)}


def measure(loaded, scorer, session, setting: tuple[int, int, int], rounds: int) -> dict:
    scorers = contenders(loaded, scorer, session, make_prompts(*setting))
    margins = {name: score() for name, score in scorers.items()}  # warms up, and all must agree
    for name, found in margins.items():
        assert torch.allclose(found, margins["one by one"], atol=1e-4), name
    seconds = {name: [] for name in scorers}
    for _ in range(rounds):
        for name, score in scorers.items():
            started = time.perf_counter()
            score()
            seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(each) for name, each in seconds.items()}
    history, candidate, count = setting
    bound = count * (history + candidate) / (history + count * candidate)
    ratios = {name: median[name] / median["ours"] for name in ("batched", "one by one")}
    print(f"H {history:5}  C {candidate}  N {count:4}  bound {bound:5.1f} ", end="")
    print(*(f" {name} {ratio:5.1f}x" for name, ratio in ratios.items()), f" ours {median['ours']:.3f} s")
    error = (margins["ours"] - margins["one by one"]).abs().max().item()
    names = {"history": history, "candidate": candidate, "candidates": count, "rounds": rounds}
    return {**names, "seconds": median, "ratio": ratios, "bound": bound, "largest_difference": error}


def rank_correlations(folder: Path, exact: torch.Tensor, setting: tuple[int, int, int]) -> dict[str, float]:
    """Scores in bfloat16 and returns how the order of candidates compares."""
    from scipy.stats import spearmanr

    loaded = load(folder, dtype="bfloat16")
    scorer = YesNoScorer(loaded)
    with scorer.session() as session:
        scorers = contenders(loaded, scorer, session, make_prompts(*setting))
        ours, whole = scorers["ours"](), scorers["one by one"]().float()
    pairs = {
        "ours, one by one": (ours, whole),
        "ours, float32": (ours, exact),
        "one by one, float32": (whole, exact),
    }
    return {name: float(spearmanr(*pair).statistic) for name, pair in pairs.items()}


def plot(grid: list[dict]) -> None:
    """Draws the ratio over one by one beside its bound: over the history's length, a line for each N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for count in dict.fromkeys(line["candidates"] for line in grid):
        lines = [line for line in grid if line["candidates"] == count]
        histories = [line["history"] for line in lines]
        (drawn,) = axes.plot(
            histories, [line["ratio"]["one by one"] for line in lines], "o-", label=f"N = {count}"
        )
        axes.plot(histories, [line["bound"] for line in lines], ":", color=drawn.get_color())
    axes.set(xscale="log", yscale="log", xlabel="tokens of history, H", ylabel="time of one by one / ours")
    axes.set_title(f"Candidates of {grid[0]['candidate']} tokens; dotted: ratio of token counts", fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        build_random(SHAPE, Path(folder) / "model")
        loaded = load(Path(folder) / "model")
        scorer = YesNoScorer(loaded)
        with scorer.session() as session:
            figures = [
                measure(loaded, scorer, session, setting, ROUNDS[place == 0])
                for place, setting in enumerate(SETTINGS)
            ]
            exact = contenders(loaded, scorer, session, make_prompts(*SETTINGS[0]))["one by one"]()
        correlations = rank_correlations(Path(folder) / "model", exact, SETTINGS[0])
    print("bfloat16, rank correlation:", correlations)
    if SMOKE:
        return
    content = {
        "benchmark": "scoring",
        "machine": describe_machine(),
        "run": describe_run(),
        "setting": {
            "layers": SHAPE.layers,
            "width": SHAPE.hidden,
            "vocabulary": SHAPE.vocabulary,
            "rows_together": TOGETHER,
            "batch_tokens": scorer.batch_tokens,
        },
        "rank_correlation": correlations,
        "figures": figures[0],
        "grid": figures[1:],
    }
    write_json(RESULTS, content)
    plot(figures[1:])


if __name__ == "__main__":
    main()

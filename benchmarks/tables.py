"""Writes the README's tables from results/*.json, so that nobody types a number.

python benchmarks/tables.py            # `make tables`
python benchmarks/tables.py --check    # status 1 where the README disagrees with the results
"""

from __future__ import annotations

import re
import sys
from typing import Any

from measured import ROOT, results, table
from ranker_tables import rankers_baby, rankers_beauty, rankers_movielens

README = ROOT / "README.md"
SYSTEMS = {
    "cot": "QLoRA, four-step chain of thought",
    "plain": "QLoRA, plain question",
    "image": "QLoRA, plain question, pictures alone",
    "text": "QLoRA, plain question, texts alone",
    "untrained-cot": "before fine-tuning, four steps",
    "untrained-plain": "before fine-tuning, plain question",
    "text-profile": "mean profile of titles and texts",
    "popularity": "popularity",
}
OBSERVERS = {
    "oracle": "knows the taste of the moment",
    "recent": "sees the last three items, counts matches",
    "order_blind": "knows all tastes, not their order",
    "sightless": "knows titles, categories and profiles",
}


def main() -> None:
    """Rewrites the README, or checks it."""
    current = README.read_text(encoding="utf-8")
    wanted = with_tables(current)
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if current == wanted else "README.md and results/ disagree; run `make tables`")
    README.write_text(wanted, encoding="utf-8")


def with_tables(readme: str) -> str:
    """Returns the README's text with every table made anew."""
    makers = (
        movielens,
        toyworld,
        finetuned,
        scoring,
        sft,
        gpu,
        benchmarks,
        pipeline,
        rankers_beauty,
        rankers_baby,
        rankers_movielens,
        rankers,
        rankers_graph,
        rankers_memory,
        growth,
        generation,
        saved,
        for_nothing,
        quickstart,
    )
    tables = {maker.__name__: maker() for maker in makers}
    for name, text in tables.items():
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        readme, found = pattern.subn(lambda match, text=text: match[1] + text + match[2], readme)
        if found != 1:
            raise SystemExit(f"README.md: expected one place for the table {name!r}, found {found}")
    return readme


def quickstart() -> str:
    """Seconds of the quickstart from an empty folder, and the AUC that it ends with."""
    ways = results("quickstart")["figures"]
    rows = [["step", *ways]]
    for step in next(iter(ways.values()))["steps"]:
        rows.append([step, *(f"{way['steps'].get(step, 0):,} s" for way in ways.values())])
    rows.append(["all", *(f"{way['seconds']:,} s" for way in ways.values())])
    for system in sorted({name for way in ways.values() for name in way["auc"]}):
        rows.append(
            [f"AUC of {system}", *(f"{way['auc'].get(system, float('nan')):.3f}" for way in ways.values())]
        )
    return table(rows)


def for_nothing() -> str:
    """Work that was done for nothing, before and after."""
    tokens, rankers = results("tokens")["figures"], results("ranker_work")["figures"]
    beside, order = results("beside_other_work"), results("epoch_sampler")["figures"]
    memory = results("prompt_memory")["figures"]
    rows = [["what", "before", "after"]]
    for name, about in (("scoring", "a row to score"), ("training", "a row to train on")):
        spent = tokens[name]["milliseconds_per_row"]
        rows.append(
            [f"tokens of {about}, 3,000 tokens", f"{spent['before']:.1f} ms", f"{spent['after']:.2f} ms"]
        )
    seconds = {when: order[when]["seconds"] / order[when]["rows"] * 100_000 for when in ("before", "after")}
    rows.append(["order of 100,000 training rows", f"{seconds['before']:.1f} s", f"{seconds['after']:.2f} s"])
    peaks = [memory[when]["measured"][-1]["peak_mb"]["scoring all rows"] for when in ("before", "after")]
    rows.append(["peak memory of reading 80,000 prompts to score", *(f"{peak:,} MB" for peak in peaks)])
    for name, about in (
        ("batch", "wait for a batch of 16,384 rows, 8 processes"),
        ("ce", "cross-entropy without gradients"),
        ("make", "FREEDOM's item graph, once it is on disk"),
        ("lattice", "LATTICE's neighbors in an epoch"),
        ("refusal", "HM4SR's refusal of data without times"),
    ):
        rows.append([about, *(f"{rankers[name][when]:.3g} s" for when in ("before", "after"))])
    slower = [f"{way['times_slower']:.1f} x" for way in beside["figures"].values()]
    rows.append([f"training beside {beside['busy_loops']} busy loops, against alone", *slower])
    return table(rows)


def toyworld() -> str:
    """The ceilings."""
    figures = results("toyworld")["figures"]["test"]
    rows = [["observer", "", "AUC", "HR@1", "HR@10", "NDCG@10"]]
    for name, knows in OBSERVERS.items():
        scores = [figures[name][metric] for metric in ("auc", "hr@1", "hr@10", "ndcg@10")]
        rows.append([f"`{name}`", knows, *(f"{score['mean']:.3f} ± {score['sd']:.3f}" for score in scores)])
    return table(rows)


def finetuned() -> str:
    """The embedded model on toy worlds, over seeds."""
    figures = results("toyworld_sft")["figures"]
    rows = [["system", "AUC", "HR@1", "HR@10", "NDCG@10"]]
    for name, what in SYSTEMS.items():
        scores = [figures[name][metric] for metric in ("auc", "hr@1", "hr@10", "ndcg@10")]
        rows.append([what, *(f"{score['mean']:.3f} ± {score['sd']:.3f}" for score in scores)])
    return table(rows)


def movielens() -> str:
    """MovieLens with posters: test lists, and the time that all of it took."""
    measured = results("movielens")
    names = {
        "posters": "fine-tuned",
        "untrained": "before fine-tuning",
        "popularity": "popularity",
        "text-profile": "mean profile of titles and plots",
    }
    rows = [["system", "AUC", "HR@1", "HR@10", "NDCG@10"]]
    for name, what in names.items():
        scores = measured["figures"][name]
        rows.append([what, *(f"{scores[metric]:.3f}" for metric in ("auc", "hr@1", "hr@10", "ndcg@10"))])
    minutes = sum(measured["seconds"].values()) / 60
    users, validated = measured["users"], measured["validated_users"]
    return (
        table(rows) + f"\nTest lists of {users} users, 1+20 uniform negatives, leave-one-out. Validation AUC "
        f"{measured['validation']['auc']:.3f} ({validated} users). All commands together took {minutes:.0f} "
        f"minutes ({measured['machine']}).\n"
    )


def benchmarks() -> str:
    """Metrics and full ranking against the alternatives."""
    metrics, full = results("metrics"), results("full_ranking")
    rows = [["measured", "against", "time of theirs / ours", "peak memory, ours / theirs"]]
    ours, setting = metrics["figures"]["recllm"], metrics["setting"]
    what = f"{len(setting['metrics'])} metrics, {setting['lists']:,} lists of {setting['candidates']}, arrays"
    for name, package in (("ranx", "ranx"), ("pytrec_eval", "pytrec-eval-terrier")):
        theirs = metrics["figures"][name]
        bare = f"{theirs['ratio_without_preparation']:.0f} without filling its dictionaries"
        rows.append(
            [
                what,
                f"{name} ({package} {metrics['versions'][package]})",
                f"{theirs['ratio']:.0f} ({bare})",
                f"{ours['peak_mib']:.0f} / {theirs['peak_mib']:.0f} MiB",
            ]
        )
    setting, ours = full["setting"], full["figures"]["recllm"]
    what = f"full ranking, {setting['users']:,} users x {setting['items']:,} items x {setting['dims']}"
    usual = {
        "usual": "scores, mask, `torch.topk`, MMRec's loop",
        "usual, sets": "the same with sets in the loop",
    }
    for name, against in usual.items():
        theirs = full["figures"][name]
        memory = f"{ours['peak_mib']:.0f} / {theirs['peak_mib']:.0f} MiB"
        rows.append([what, against, f"{theirs['ratio']:.1f}", memory])
    return f"Machine: {metrics['machine']}.\n\n" + table(rows)


def growth() -> str:
    """Peak memory of full ranking as the users and the catalog grow."""
    rows = [
        ["full ranking, users x items", "peak memory above the embeddings", "a dense score matrix would be"]
    ]
    for line in results("full_ranking")["growth"]:
        sizes = f"{line['users']:,} x {line['items']:,}"
        rows.append([sizes, f"{line['peak_mib']:.0f} MiB", f"{line['dense_mib']:,.0f} MiB"])
    return table(rows)


def pipeline() -> str:
    """Import, 5-core and split against pandas."""
    measured = results("data_pipeline")
    rows = [["import + 5-core + leave-one-out, rows", "recllm", "pandas", "time of pandas / ours"]]
    for line in measured["figures"]:
        cells = [
            f"{line[name]['seconds']:.1f} s, {line[name]['peak_gb']:.1f} GB" for name in ("recllm", "pandas")
        ]
        rows.append([f"{line['rows']:,}", *cells, f"{1 / line['time_ratio']:.1f}"])
    return table(rows)


def generation() -> str:
    """What the run loop and its store cost."""
    figures = results("generation_store")["figures"]
    rows = [["requests to a model that takes no time", "new", "already stored", "peak memory"]]
    for line in figures["by_size"]:
        if line["requests"] > 1:
            rates = (f"{line[name]:,.0f} a second" for name in ("requests_per_second", "stored_per_second"))
            rows.append([f"{line['requests']:,}", *rates, f"{line['peak_mib']:.0f} MiB"])
    beside = [["beside a model", "over bare `model.generate`", "over the backend without store"]]
    for name, each in figures["beside_a_model"].items():
        ways = each["ways"]
        over_bare = ways["generate"]["ratio"] - 1
        over_backend = ways["generate"]["seconds"] / ways["backend"]["seconds"] - 1
        what = f"{name}, {each['parameters'] / 1e6:.1f} M parameters, {each['requests']} requests"
        beside.append([what, f"{over_bare:+.1%}", f"{over_backend:+.1%}"])
    return table(rows) + "\n" + table(beside)


def saved() -> str:
    """What need not be computed again: answers and visual tokens."""
    figures, visual = results("deduplication")["figures"], results("visual_store")
    images, windows = figures["images"], figures["windows"]
    naive = images["per_interaction"] + images["per_candidate"]
    rows = [["computed once", "against", "factor"]]
    rows += [
        [
            f"descriptions of images, MovieLens: {images['different']:,}",
            f"one for each interaction and candidate: {naive:,}",
            f"{images['factor']:.1f}",
        ],
        [
            f"summaries of windows, three parts: {windows['different']:,}",
            f"each part for itself: {windows['per_part']:,}",
            f"{windows['factor']:.1f}",
        ],
    ]
    setting, image = visual["setting"], visual["image"]
    what = f"visual tokens from the store, {setting['users']} users x {setting['candidates']} candidates"
    for name, figure in visual["figures"].items():
        if name != "store":
            rows.append([what, name, f"{figure['ratio']:.1f}"])
    size = f"{image['tokens']:.0f} tokens, {image['bfloat16_bytes'] / 1024:.1f} KiB in bfloat16"
    return table(rows) + f"\nAn image of that benchmark takes {size} in the visual store.\n"


def scoring() -> str:
    """The shared-prefix scorer against whole prompts."""
    measured = results("scoring")
    rows = [["history", "candidates", "over whole prompts, batched", "over one by one", "ratio of tokens"]]
    for line in [measured["figures"], *measured["grid"]]:
        ratios = (f"{line['ratio'][name]:.1f}" for name in ("batched", "one by one"))
        rows.append([f"{line['history']:,}", f"{line['candidates']}", *ratios, f"{line['bound']:.1f}"])
    kept = measured["rank_correlation"]["ours, one by one"]
    return (
        table(rows)
        + f"\nIn bfloat16 the order of candidates correlates with that of one by one by {kept:.4f}.\n"
    )


def sft() -> str:
    """A step of fine-tuning against TRL's trainer."""
    names = {"embedded": "the embedded model", "wide": "a vocabulary of {vocabulary:,}"}
    rows = [["a step of LoRA", "", "time", "TRL's time / its own", "peak memory", "TRL's / its own"]]
    for name, line in results("sft")["figures"].items():
        what = (
            f"{names[name].format(**line)}, {line['setting']['batch']} rows of {line['tokens_per_row']:,.0f}"
        )
        for way in line["ways"]:
            who = way["way"] + (", gradient checkpointing" if way["checkpointing"] else "")
            time = f"{way['seconds']:.2f} s", f"{way['time_ratio']:.2f}"
            memory = f"{way['peak_mib']:,.0f} MiB", f"{way['memory_ratio']:.2f}"
            rows.append([f"{what} tokens", who, *time, *memory])
    return table(rows)


def rankers() -> str:
    """Training on Beauty against RecBole."""
    measured = results("rankers")
    rows = [["ranker", "", "an epoch", "best validation NDCG@10", "training until RecBole's best"]]
    for ranker, line in measured["figures"].items():
        to_best, ours = line["seconds_to_best"], line["our_seconds_to_it"]
        reached = "not reached" if ours is None else f"{ours:,.0f} s ({line['time_ratio']:.1f} x faster)"
        for name, other, cell in (("recbole", "RecBole", f"{to_best:,.0f} s"), ("recllm", "recllm", reached)):
            figures = line[name]
            epoch = f"{figures['seconds_an_epoch']:.1f} s"
            if name == "recllm" and ranker != "bert4rec":  # whose epochs are not of the same examples
                epoch += f" ({line['epoch_ratio']:.1f} x faster)"
            best = f"{figures['best_ndcg@10']:.4f} (epoch {figures['best_epoch']} of {figures['epochs']})"
            rows.append([f"`{ranker}`", other, epoch, best, cell])
    ends = (f"{line['ended']} (`{ranker}`)" for ranker, line in measured["figures"].items())
    return table(rows) + f"\nRecBole was ended after {', '.join(ends)}.\n"


def rankers_graph() -> str:
    """The graph of nearest neighbors: against the dense way, and as the catalog grows."""
    measured = results("rankers_graph")
    figures, setting = measured["figures"], measured["setting"]
    rows = [["items", "way", "time", "peak memory above the vectors"]]
    for name, what in (("dense", "dense, as LATTICE"), ("recllm", "recllm")):
        line = figures[name]
        rows.append(
            [f"{setting['items']:,}", what, f"{line['seconds']:.2f} s", f"{line['peak_mib']:,.0f} MiB"]
        )
    for line in measured["growth"]:
        cells = f"{line['seconds']:.2f} s", f"{line['peak_mib']:,.0f} MiB"
        rows.append([f"{line['items']:,}", "recllm", *cells])
    told = (
        f"Paired at {setting['items']:,} items, the dense way takes {measured['ratio']:.1f} times as long.\n"
    )
    return table(rows) + "\n" + told


def rankers_memory() -> str:
    """Memory of a step with cross-entropy over the whole catalog."""
    rows = [["items", "recllm", "`torch.nn.functional.cross_entropy`", "parameters, gradients, Adam"]]
    for line in results("rankers_memory")["figures"]:
        plain = f"{line['plain']['above_mib']:,.0f} MiB" if line["plain"] else "not run"
        cells = f"{line['blocked']['above_mib']:,.0f} MiB", plain, f"{line['blocked']['kept_mib']:,.0f} MiB"
        rows.append([f"{line['items']:,}", *cells])
    return table(rows)


def gpu() -> str:
    """Scoring and fine-tuning on a GPU."""
    if not (ROOT / "results" / "gpu.json").is_file():
        return "No GPU has been measured yet; `python benchmarks/gpu.py` does it where there is one.\n"
    measured = results("gpu")
    scored = [["scoring", "", "users a second", "ours / its own", "share of peak FLOP/s", "peak memory"]]
    trained = [["a step of fine-tuning", "", "tokens a second", "share of peak FLOP/s", "peak memory"]]
    for model, figures in measured["figures"].items():
        for name, line in figures["scoring"]["ways"].items():
            rates = f"{line['users_per_second']:.2f}", f"{line['time_ratio']:.1f}"
            scored.append([f"`{model}`", name, *rates, *_of_device(line)])
        for name, line in figures["sft"].items():
            trained.append([f"`{model}`", name, f"{line['tokens_per_second']:,.0f}", *_of_device(line)])
    return f"Device: {measured['device']}.\n\n" + table(scored) + "\n" + table(trained)


def _of_device(line: dict[str, Any]) -> tuple[str, str]:
    share = line["share_of_peak"]
    return "unknown" if share is None else f"{share:.0%}", f"{line['peak_mib'] / 1024:.1f} GiB"


if __name__ == "__main__":
    main()

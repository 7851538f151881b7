"""The `recllm` command, for example `recllm data import table log.csv OUT`; `recllm --help` lists them."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import recllm
from recllm.config import run_command

# The words of a command -> (module with the options and the function, options class, function, what it does).
COMMANDS: dict[str, tuple[str, str, str, str]] = {
    "quickstart": (
        "recllm.quickstart",
        "QuickstartOptions",
        "quickstart",
        "the main job on the toy world, in minutes: start here",
    ),
    "data import table": (
        "recllm.data.commands",
        "Table",
        "import_raw",
        "CSV, TSV, JSONL or parquet by column names",
    ),
    "data import movielens": (
        "recllm.data.commands",
        "MovieLens",
        "import_raw",
        "MovieLens, with posters and plots",
    ),
    "data import amazon": (
        "recllm.data.commands",
        "Amazon",
        "import_raw",
        "Amazon Reviews 2014, 2018 and 2023",
    ),
    "data import microlens": ("recllm.data.commands", "MicroLens", "import_raw", "MicroLens, with covers"),
    "data import yelp": ("recllm.data.commands", "Yelp", "import_raw", "Yelp Open Dataset, with photos"),
    "data import recbole": ("recllm.data.commands", "RecBole", "import_raw", "RecBole atomic files"),
    "data import sequences": (
        "recllm.data.commands",
        "ItemSequences",
        "import_raw",
        "one line a user: user item item ...",
    ),
    "data import presplit": ("recllm.data.commands", "PreSplit", "import_raw", "train, valid and test pairs"),
    "data toyworld": ("recllm.data.commands", "ToyworldConfig", "toyworld", "make the toy world"),
    "data inspect": ("recllm.data.commands", "InspectOptions", "inspect", "what is in a dataset"),
    "data filter": (
        "recllm.data.commands",
        "FilterOptions",
        "filter_",
        "k-core, rating threshold, image or text required",
    ),
    "data split": ("recllm.data.commands", "SplitOptions", "split", "training, validation and test"),
    "data candidates": (
        "recllm.data.commands",
        "CandidateOptions",
        "candidates",
        "1+N candidates for each target",
    ),
    "build items": (
        "recllm.builders.commands",
        "ItemOptions",
        "items",
        "texts about items: image understanding, summaries, keywords",
    ),
    "build users": (
        "recllm.builders.commands",
        "UserOptions",
        "users",
        "texts about users: preferences, window by window",
    ),
    "build instructions": (
        "recllm.builders.commands",
        "InstructionOptions",
        "instructions",
        "prompt and completion chats, plain or four-step CoT",
    ),
    "build image-prompts": (
        "recllm.builders.commands",
        "ImagePromptOptions",
        "image_prompts",
        "REVEAL's initial prompts",
    ),
    "build image-feedback": (
        "recllm.reveal.feedback",
        "ImageFeedbackOptions",
        "build_feedback",
        "what validation lists say of each item (REVEAL)",
    ),
    "build image-rewrites": (
        "recllm.reveal.rewriting",
        "ImageRewriteOptions",
        "rewrite_prompts",
        "image prompts that a model rewrites by feedback (REVEAL)",
    ),
    "reveal": (
        "recllm.reveal.loop",
        "RevealOptions",
        "reveal",
        "REVEAL on a multimodal ranker: embed, train, feedback, rewrite prompts, and again",
    ),
    "embed images": (
        "recllm.reveal.embed",
        "EmbedImagesOptions",
        "embed_images",
        "item vectors from images under prompts (REVEAL), for --image of rankers",
    ),
    "whatis": (
        "recllm.report.provenance",
        "WhatisOptions",
        "whatis",
        "what made a file or folder, from which files, and what has changed since",
    ),
    "prompts ls": ("recllm.builders.commands", "ListOptions", "prompts_ls", "show the prompt templates"),
    "prompts cp": ("recllm.builders.commands", "CopyOptions", "prompts_cp", "write them as files to change"),
    "recipes ls": (
        "recllm.recipe_files",
        "RecipesListOptions",
        "recipes_ls",
        "show the recipes that come along",
    ),
    "recipes cp": ("recllm.recipe_files", "RecipesCopyOptions", "recipes_cp", "copy one to change it"),
    "export": (
        "recllm.training.export",
        "ExportOptions",
        "export",
        "merge a run's adapter into its model, and check that it scores the same",
    ),
    "model tiny": (
        "recllm.mllm.model_commands",
        "TinyOptions",
        "tiny",
        "the folder of the embedded model",
    ),
    "model train-tiny": (
        "recllm.mllm.model_commands",
        "TrainTinyOptions",
        "train_tiny",
        "train the embedded model from nothing",
    ),
    "store stats": (
        "recllm.mllm.store_commands",
        "StatsOptions",
        "stats",
        "what a store of generated texts holds",
    ),
    "store verify": ("recllm.mllm.store_commands", "VerifyOptions", "verify", "check each line of a store"),
    "store export": (
        "recllm.mllm.store_commands",
        "ExportOptions",
        "export",
        "a store as one parquet or JSONL file",
    ),
    "retrieve neighbors": (
        "recllm.retrieval.neighbors",
        "NeighborOptions",
        "find_neighbors",
        "similar users and what they chose next, by a sequence ranker's states (MMSRARec)",
    ),
    "score popularity": (
        "recllm.rankers.commands",
        "PopularityOptions",
        "popularity",
        "the popularity baseline",
    ),
    "score ranker": (
        "recllm.rankers.score_ranker",
        "ScoreRankerOptions",
        "score_ranker",
        "a trained recommender (recipes/train_ranker.py): rank records or scores",
    ),
    "score profile": (
        "recllm.retrieval.commands",
        "ProfileOptions",
        "profile",
        "the mean-profile baseline: sentence embeddings of what a user touched",
    ),
    "score yes-no": (
        "recllm.mllm.scoring.command",
        "YesNoOptions",
        "score_yes_no",
        "a multimodal LLM's yes/no margins for instruction rows",
    ),
    "eval ranks": (
        "recllm.evaluation.commands",
        "RankReportConfig",
        "rank_report",
        "metrics of scores or rank records",
    ),
    "eval compare": (
        "recllm.evaluation.commands",
        "CompareRunsConfig",
        "compare_runs",
        "significance between systems",
    ),
    "eval rerank": (
        "recllm.retrieval.commands",
        "RerankOptions",
        "rerank",
        "rank records of a top-K list that another system ranked again",
    ),
    "report": ("recllm.report.commands", "ReportOptions", "report", "one HTML file that tells all of it"),
}


_LIKE = 0.6  # less alike, a name is not what was meant


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; exits with 1 for what the user can mend, with 2 for unusable arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks an id's letters must not end the run
            stream.reconfigure(errors="backslashreplace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    if arguments[0] in ("-V", "--version"):
        print(f"recllm {recllm.__version__}")
        return
    for length in (3, 2, 1):
        words = " ".join(arguments[:length])
        if words in COMMANDS and len(arguments) >= length:
            _run(words, arguments[length:])
            return
    _refuse(arguments)


def _run(words: str, rest: list[str]) -> None:
    module_name, options, function, _ = COMMANDS[words]
    try:
        module = importlib.import_module(module_name)
        run_command(getattr(module, options), getattr(module, function), rest, prog=f"recllm {words}")
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `recllm ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(arguments: list[str]) -> None:
    flag = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    said = " ".join(arguments[: min(flag, 3)])
    begun = [words for words in COMMANDS if words.startswith(said + " ")]
    if begun:
        asked = any(word in ("-h", "--help") for word in arguments)
        print(_overview(begun), file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)

    def likeness(words: str) -> float:
        length = len(words.split())
        return difflib.SequenceMatcher(None, words, " ".join(arguments[:length])).ratio()

    near = max(COMMANDS, key=likeness)
    hint = f"; the nearest is {near!r}" if likeness(near) >= _LIKE else ""
    print(f"error: no command {said!r}{hint} (`recllm --help` lists all)", file=sys.stderr)
    raise SystemExit(2)


def _overview(commands: Sequence[str] = tuple(COMMANDS)) -> str:
    width = max(map(len, commands))
    lines = [f"  recllm {words:<{width}}  {COMMANDS[words][3]}" for words in commands]
    return "\n".join(["usage: recllm COMMAND [options]   (COMMAND --help says which)", "", *lines])


if __name__ == "__main__":
    main()

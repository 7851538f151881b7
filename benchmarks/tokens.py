"""From instruction rows to tokens: each part of a text once, against whole prompts through the tokenizer.

    python benchmarks/tokens.py
    python benchmarks/tokens.py --smoke      a few rows, nothing written

Rows of a toy world list ten images and titles, then a candidate; images are enlarged to 256 tokens each, as
those of posters. `before` is what libraries offer: for each row the chat template, the tokenizer on the
rendered chat (for the guard against forged turns) and on the chat with all image tokens; in training also on
the completion and on the whole conversation, and each image's header. `after` is the scorer's `PromptReader`
and training's `ConversationEncoder`, beginning with nothing known. Both must return the same tokens. Seconds
are of the CPU, over all threads; rounds are interleaved, figures are medians.

Writes results/tokens.json.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import torch

from recllm.builders.instruction_rows import request_of
from recllm.files import write_json
from recllm.mllm import tokens
from recllm.mllm.chat import Request
from recllm.mllm.loading import load
from recllm.mllm.rendering import expand
from recllm.mllm.scoring.prompts import PromptReader, group_rows, image_sizes, messages_of, units_of
from recllm.mllm.scoring.tables import unit_reader
from recllm.mllm.vision.images import image_size
from recllm.runs.provenance import describe_machine, describe_run
from recllm.training.conversations import ConversationEncoder

RESULTS = Path(__file__).parent.parent / "results" / "tokens.json"
SMOKE = "--smoke" in sys.argv
USERS, ROUNDS = (20, 1) if SMOKE else (20, 3)
COMMANDS = (
    f"data toyworld --users {USERS} --items 200 toys",
    "data split toys loo",
    "data candidates toys/splits/loo --negatives 20",
    "build instructions toys --preference none --history 10 --history-as image+title --parts train valid "
    "--candidates 1+20-uniform-seed42 --targets-per-user 2",
)
PIXELS = 448 * 448


def scoring(loaded, rows, folder):
    """Returns the two ways to read the rows of candidate lists."""
    sizes = image_sizes(rows, folder)

    def before():
        found = []
        for row in rows.iter_rows(named=True):
            request = Request(row["id"], messages_of(row), tuple(folder / path for path in row["images"]))
            text = template(loaded, request.messages, True)
            ids(loaded, text)
            found.append(ids(loaded, expand(loaded, text, [sizes[path] for path in row["images"]])))
        return found

    def after():
        reader = PromptReader(loaded, folder, sizes, str)
        prompts = [
            prompt
            for unit in units_of(group_rows(rows))
            for group in unit_reader(reader, rows, unit)()
            for prompt in group
        ]
        return [prompt.tokens.tolist() for prompt in sorted(prompts, key=lambda prompt: prompt.row)]

    return {"before": before, "after": after}


def training(loaded, rows, folder):
    """Returns the two ways to turn rows of training into tokens."""

    def before():
        found = []
        for row in rows.iter_rows(named=True):
            request = request_of(row, folder)
            (answer,) = row["completion"]
            ids(loaded, answer["content"][0]["text"])
            text = template(loaded, request.messages, True)
            ids(loaded, text)
            whole = template(loaded, [*request.messages, answer], False)
            expanded = expand(loaded, text, [image_size(path) for path in request.images])
            ids(loaded, expanded)
            found.append(ids(loaded, expanded + whole[len(text) :]))
        return found

    def after():
        encoder = ConversationEncoder(loaded, folder)
        return [encoder.encode(row).tokens for row in rows.iter_rows(named=True)]

    return {"before": before, "after": after}


def template(loaded, messages, opened):
    return loaded.processor.apply_chat_template(list(messages), add_generation_prompt=opened, tokenize=False)


def ids(loaded, text):
    return loaded.tokenizer(text).input_ids


def measure(loaded, ways):
    """Returns the CPU seconds of each way, a row."""
    seconds, found = {name: [] for name in ways}, {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            tokens.forget()
            loaded.words_of_shape.clear()
            started = time.process_time()
            found[name] = way()
            seconds[name].append(time.process_time() - started)
    assert found["before"] == found["after"], "the two ways must return the same tokens"
    rows = len(found["after"])
    median = {name: statistics.median(each) / rows for name, each in seconds.items()}
    return {
        "rows": rows,
        "tokens_per_row": statistics.mean(len(row) for row in found["after"]),
        "milliseconds_per_row": {name: 1000 * value for name, value in median.items()},
        "ratio": median["before"] / median["after"],
    }


def main():
    with tempfile.TemporaryDirectory() as temporary:
        for command in COMMANDS:
            words = [sys.executable, "-m", "recllm.cli", *command.split()]
            subprocess.run(words, cwd=temporary, check=True, stdout=subprocess.DEVNULL)
        folder = Path(temporary) / "toys"
        (instructions,) = (folder / "instructions").iterdir()
        loaded = load("tiny", min_pixels=PIXELS, max_pixels=PIXELS)
        figures = {
            name: measure(loaded, ways(loaded, pl.read_parquet(instructions / f"{part}.parquet"), folder))
            for name, ways, part in (("scoring", scoring, "valid"), ("training", training, "train"))
        }
    for name, line in figures.items():
        print(name, line)
    if not SMOKE:
        content = {
            "benchmark": "tokens",
            "machine": describe_machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "run": describe_run(),
            "commands": COMMANDS,
            "figures": figures,
        }
        write_json(RESULTS, content)


if __name__ == "__main__":
    main()

"""`recllm reveal`: REVEAL's algorithm 2, as a chain of commands that each can be run by hand.

    OUT/manifest.json              settings, hashes, a row for each cycle, which cycle was chosen and why it ended
    OUT/critic-users.parquet       validation users whose lists are the feedback
    OUT/choosing-users.parquet     the others, whose lists choose epochs and cycles
    OUT/cycle-N/prompts.parquet    the prompts of the cycle; prompts-rewrites.parquet: how they came about
               /images.safetensors `recllm embed images` (eq. 1)
               /run/               recipes/train_ranker.py, with AVL (eq. 5 to 15)
               /ranks, /topk       `recllm score ranker --part valid` (eq. 2)
               /feedback.parquet   `recllm build image-feedback`; `recllm build image-rewrites` (eq. 3, 4) follows

The test part is never opened. Steps whose files exist are not run again, so the same command resumes a run that
was killed.
"""  # noqa: E501

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recllm.data.candidates import full_ranking
from recllm.data.dataset import Dataset
from recllm.data.splits import Split
from recllm.data.tables import read_users
from recllm.errors import DataError
from recllm.evaluation import compute_metrics
from recllm.evaluation.ranks import RankRecords
from recllm.files import MANIFEST, read_json, write_file, write_json
from recllm.rankers.fit import METRICS
from recllm.recipe_files import recipe_path
from recllm.reveal.feedback import divide_users
from recllm.reveal.options import RevealOptions, check_options, training_flags
from recllm.reveal.rewriting import REWRITTEN, rewrites_path
from recllm.runs.folder import lock_run, release_run, setting_differences, settings_of
from recllm.runs.provenance import describe_run
from recllm.steps import Step, run_step

KIND = "reveal run"
CRITIC_USERS, CHOOSING_USERS = "critic-users.parquet", "choosing-users.parquet"
_FREE_ON_RESUME = ("out", "cycles", "launch", "base_url", "api_key_env")
_FALLS = 2  # validations in a row, each below the one before, after which the loop ends

Run = Callable[[Step], None]


@dataclass(frozen=True)
class Cycle:
    """What came of a cycle.

    Attributes:
        number: From 0.
        rewritten: Prompts that differ from those of the cycle before.
        choosing: Metrics on the validation lists of the users who choose.
        critic: The same on the lists that are the feedback.
    """

    number: int
    rewritten: int
    choosing: dict[str, float]
    critic: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Returns what the manifest says about the cycle."""
        return {
            "cycle": self.number,
            "rewritten": self.rewritten,
            "valid": self.choosing,
            "critic": self.critic,
        }


def reveal(options: RevealOptions, run: Run | None = None) -> Path:
    """Runs all cycles that are not done yet, and returns the run of the ranker that was chosen.

    Args:
        options: What to run.
        run: Runs a step; by default in a process of its own.

    Raises:
        DataError: An option cannot work, the folder is another's or was begun with other options or data, or
            a step failed (what it said stands above).
        BusyError: Another process works in the folder.
    """
    training = check_options(options)
    dataset = Dataset.open(options.dataset)
    split = Split.open(dataset.folder / "splits" / options.split, dataset=dataset)
    out = options.out or Path("runs") / f"reveal-{options.ranker}"
    lock = lock_run(out)
    try:
        manifest = _begin(options, split, out)
        chain = _Chain(options, split, out, run or _in_a_process)
        cycles, why = _cycles(chain, training.valid_metric)
        best = max(cycles, key=lambda each: (each.choosing[training.valid_metric], -each.number))
        manifest |= {
            "status": "finished",
            "valid_metric": training.valid_metric,
            "cycles": [each.as_json() for each in cycles],
            "chosen": best.number,
            "ended": why,
        }
        write_json(out / MANIFEST, manifest)
    finally:
        release_run(lock)
    _tell(out, cycles, best, training.valid_metric, why)
    return chain.run_of(best.number)


def _cycles(chain: _Chain, metric: str) -> tuple[list[Cycle], str]:
    """Runs cycle after cycle, and returns them and why there are no more."""
    most = chain.options.cycles if chain.options.fve else 1
    cycles: list[Cycle] = []
    rewritten = 0
    for number in range(most):
        chain.train(number)
        cycles.append(chain.measured(number, rewritten))
        values = [each.choosing[metric] for each in cycles[-1 - _FALLS :]]
        if len(values) > _FALLS and all(b < a for a, b in itertools.pairwise(values)):
            return cycles, f"validation {metric} fell {_FALLS} times in a row"
        if number + 1 == most:
            break
        rewritten = chain.rewrite(number)
        if not rewritten:
            return cycles, "no prompt changed"
    return cycles, "all cycles are done" if chain.options.fve else "prompts stay as they are (--no-fve)"


class _Chain:
    """The steps of the cycles."""

    def __init__(self, options: RevealOptions, split: Split, out: Path, run: Run) -> None:
        self.options, self._split, self._out, self._run = options, split, out, run
        self._folder = split.folder
        self._quantization = None if options.quantization == "none" else options.quantization

    def folder(self, number: int) -> Path:
        """Returns the folder of a cycle."""
        return self._out / f"cycle-{number}"

    def run_of(self, number: int) -> Path:
        """Returns the ranker's run of a cycle."""
        return self.folder(number) / "run"

    def prompts(self, number: int) -> Path:
        """Returns the prompts of a cycle."""
        given = self.options.prompts if number == 0 else None
        return given or self.folder(number) / "prompts.parquet"

    def train(self, number: int) -> None:
        """Embeds the images, trains the ranker, and ranks the catalog for the validation users."""
        for step in self._training_steps(number):
            self._do(step)

    def rewrite(self, number: int) -> int:
        """Rewrites the prompts of a cycle for the next one, and returns how many changed."""
        for step in self._rewriting_steps(number):
            self._do(step)
        record = pl.read_parquet(rewrites_path(self.prompts(number + 1)), columns=["status"])
        return int((record["status"] == REWRITTEN).sum())

    def measured(self, number: int, rewritten: int) -> Cycle:
        """Returns the metrics of a cycle on both halves of the validation users."""
        records = RankRecords.load(self._ranks(number))
        table = compute_metrics(records, names=list(METRICS)).per_user()
        halves = []
        for name in (CHOOSING_USERS, CRITIC_USERS):
            own = table.filter(pl.col("user").is_in(read_users(self._out / name)))
            halves.append({metric: float(own[metric].mean()) for metric in METRICS})
        return Cycle(number, rewritten, *halves)

    def _ranks(self, number: int) -> Path:
        return self.folder(number) / "ranks" / "run-valid.parquet"

    def _do(self, step: Step) -> None:
        print(f"\n== {step.about}\n$ {shlex.join(step.words)}", flush=True)
        if Path(step.makes).exists():
            print(f"{step.makes} is there already")
            return
        started = time.monotonic()
        self._run(step)
        if not Path(step.makes).exists():
            raise DataError(f"the step {step.about!r} ended well, but did not write {step.makes}")
        print(f"({time.monotonic() - started:.0f} s)", flush=True)

    def _training_steps(self, number: int) -> Iterator[Step]:
        options, folder = self.options, self.folder(number)
        vectors, name = folder / "images.safetensors", f"cycle {number}"
        if number == 0 and options.prompts is None:
            words = _words("build image-prompts", options.dataset, split=options.split, out=self.prompts(0))
            words += _flags(templates=options.templates)
            yield self._recllm("initial prompts", words, self.prompts(0))
        words = _words(
            "embed images", options.dataset, model=options.model, prompts=self.prompts(number), out=vectors
        )
        words += _flags(pooling=options.pooling, order=options.order, max_pixels=options.max_pixels)
        words += _flags(quantization=self._quantization)
        yield self._recllm(f"{name}: images under prompts (eq. 1)", words, vectors, launched=True)
        words = (
            *training_flags(options),
            *_flags(split=self._folder, image=vectors, out=self.run_of(number), resume="auto"),
            *_flags(valid_only=self._out / CHOOSING_USERS),
        )
        about = f"{name}: training {options.ranker}" + (
            "" if options.avl == "none" else " with AVL (eq. 5-15)"
        )
        start = (
            ("python",)
            if options.launch is None
            else ("accelerate", "launch", "--config_file", str(options.launch))
        )
        script = str(recipe_path("train_ranker.py"))
        yield Step(about, (*start, script, *words), str(self.run_of(number) / "metrics.json"))
        words = _words(
            "score ranker", self.run_of(number), part="valid", top_k=options.top_k, out=folder, name="run"
        )
        yield self._recllm(f"{name}: validation lists (eq. 2)", (*words, "--overwrite"), self._ranks(number))

    def _rewriting_steps(self, number: int) -> Iterator[Step]:
        options, folder = self.options, self.folder(number)
        feedback, after = folder / "feedback.parquet", self.prompts(number + 1)
        words = _words(
            "build image-feedback",
            self._folder,
            lists=folder / "topk" / "run-valid.parquet",
            ranks=self._ranks(number),
            users=self._out / CRITIC_USERS,
            out=feedback,
        )
        words += ("--never-retrieved",) if options.never_retrieved else ()
        yield self._recllm(f"cycle {number}: feedback", words, feedback)
        local = options.backend == "transformers"
        words = _words(
            "build image-rewrites",
            options.dataset,
            model=options.critic or options.model,
            prompts=self.prompts(number),
            feedback=feedback,
            out=after,
            calls=options.calls,
            share=options.share,
            choose=options.rewrite,
            choice_seed=options.seed + number if options.rewrite == "random" else None,
            backend=options.backend,
            quantization=self._quantization if local else None,
            base_url=options.base_url if options.backend == "server" else None,
            api_key_env=options.api_key_env if options.backend == "server" else None,
            max_pixels=options.max_pixels,
            max_new_tokens=options.max_new_tokens,
            templates=options.templates,
        )
        about = f"cycle {number}: prompts rewritten (eq. 3, 4)"
        yield self._recllm(about, (*words, "--overwrite"), after, launched=local)

    def _recllm(self, about: str, words: tuple[str, ...], makes: Path, *, launched: bool = False) -> Step:
        start: tuple[str, ...] = ("recllm",)
        if launched and self.options.launch is not None:
            start = ("accelerate", "launch", "--config_file", str(self.options.launch), "-m", "recllm.cli")
        return Step(about, (*start, *words), str(makes))


def _begin(options: RevealOptions, split: Split, out: Path) -> dict[str, Any]:
    """Makes the folder, or checks what was begun there; returns its manifest."""
    settings = settings_of(options)
    manifest = {
        "kind": KIND,
        "status": "running",
        "settings": settings,
        "dataset": str(split.dataset.folder),
        "data_hash": split.dataset.data_hash,
        "split_hash": split.split_hash,
        "protocol": split.protocol,
        "run": describe_run(),
    }
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        write_json(out / MANIFEST, manifest)
    else:
        before = read_json(out / MANIFEST, "the folder of `recllm reveal`")
        if before.get("kind") != KIND:
            raise DataError(
                f"{out} is a {before.get('kind')}, not a folder of `recllm reveal`; give another --out"
            )
        told = setting_differences(settings, before["settings"], _FREE_ON_RESUME)
        told += [
            name.replace("_", " ") for name in ("data_hash", "split_hash") if before[name] != manifest[name]
        ]
        if told:
            raise DataError(
                f"{out} was begun with other settings ({'; '.join(told)}); give the same, or another --out"
            )
    for name, users in zip(
        (CRITIC_USERS, CHOOSING_USERS),
        divide_users(full_ranking(split, "valid").user_ids, options.seed),
        strict=True,
    ):
        if not (out / name).exists():
            write_file(out / name, lambda path, users=users: users.to_frame("user").write_parquet(path))
    return manifest


def _words(command: str, first: Path, **flags: object) -> tuple[str, ...]:
    return (*command.split(), str(first), *_flags(**flags))


def _flags(**values: object) -> tuple[str, ...]:
    """Returns values as flags; None is left out."""
    given = (
        (f"--{name.replace('_', '-')}", str(value)) for name, value in values.items() if value is not None
    )
    return tuple(word for pair in given for word in pair)


def _in_a_process(step: Step) -> None:
    run_step(step, Path(), again="the same `recllm reveal`")


def _tell(out: Path, cycles: list[Cycle], best: Cycle, metric: str, why: str) -> None:
    print(f"\n{out}: {why}. Validation {metric} of the users who choose (and of the critic's):")
    for each in cycles:
        mark = "  <- chosen" if each is best else ""
        print(
            f"  cycle {each.number}: {each.choosing[metric]:.4f} ({each.critic[metric]:.4f}), "
            f"{each.rewritten:,} prompts rewritten before it{mark}"
        )
    run = out / f"cycle-{best.number}" / "run"
    print(f"next: recllm score ranker {run} --name {out.name}")

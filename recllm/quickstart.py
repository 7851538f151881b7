"""`recllm quickstart`: the main job on the toy world, as a chain of commands that each can be run by hand."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from recllm.errors import DataError
from recllm.files import read_json, write_json
from recllm.recipe_files import recipe_path
from recllm.steps import Step, run_step

CANDIDATES = "1+20-uniform-seed42"


@dataclass
class QuickstartOptions:
    """Runs the main job on the toy world: texts, four-step CoT rows, QLoRA, yes/no scores, report."""

    out: Positional[Annotated[Path, arg(metavar="OUT")]] = Path("quickstart")
    """The folder to work in; what an earlier run finished there is used again."""
    users: int = 500
    """Users of the toy world."""
    items: int = 200
    """Its items."""
    seed: int = 0
    """Seed of the toy world and of training."""
    max_steps: int = 220
    """Optimizer steps of fine-tuning."""


def quickstart(options: QuickstartOptions) -> Path:
    """Runs all steps that are not done yet and returns the report's path.

    Raises:
        DataError: A number is too small, the folder is another's or was begun with other options, or a step
            failed (what it said stands above).
    """
    for name, least in (("users", 20), ("items", 100), ("max_steps", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise DataError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {least} or more")
    _keep_settings(options)
    steps = list(_steps(options))
    begun = time.monotonic()
    for number, step in enumerate(steps, 1):
        print(f"\n== {number}/{len(steps)} {step.about}\n$ {shlex.join(step.words)}", flush=True)
        if (options.out / step.makes).exists():
            print(f"{options.out / step.makes} is there already")
            continue
        started = time.monotonic()
        _run(step, options.out)
        print(f"({time.monotonic() - started:.0f} s; {time.monotonic() - begun:.0f} s in all)", flush=True)
    report = options.out / "report" / "report.html"
    print(
        f"\nThe commands above were run in {options.out}; each can be run there again by hand.\n"
        f"The report: {report.resolve()}"
    )
    return report


def _keep_settings(options: QuickstartOptions) -> None:
    """Writes the options into the folder, or compares them with those of an earlier run there."""
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    path = options.out / "quickstart.json"
    if path.exists():
        before = read_json(path, "the options of an earlier quickstart")
        if before != settings:
            told = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in before.items())
            raise DataError(f"{options.out} was begun with {told}: give the same, or another folder")
    elif options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise DataError(f"{options.out} is not empty and no quickstart's: give another folder")
    else:
        write_json(path, settings)


def _run(step: Step, folder: Path) -> None:
    run_step(step, folder, again="the same quickstart")


def _steps(options: QuickstartOptions) -> Iterator[Step]:
    def recllm(about: str, command: str, makes: str) -> Step:
        return Step(about, ("recllm", *command.split()), makes)

    split = "toys/splits/loo"
    lists = f"{split}/candidates/{CANDIDATES}"
    yield recllm(
        "a toy world: pictures show what no text says, tastes drift",
        f"data toyworld --users {options.users} --items {options.items} --seed {options.seed} toys",
        "toys",
    )
    yield recllm("leave-one-out: each user's last item is the test", "data split toys loo", split)
    yield recllm(
        "20 negatives for each target", f"data candidates {split} --negatives 20", f"{lists}/test.parquet"
    )
    yield recllm(
        "what pictures show (VIU) and item summaries (IMSG), by the embedded Qwen2-VL",
        "build items toys --model tiny",
        "toys/texts/imsg.parquet",
    )
    yield recllm(
        "preferences as they drift, window by window (TUBC)",
        "build users toys --model tiny --split loo --parts train valid test",
        "toys/texts/tubc-test.parquet",
    )
    yield recllm(
        "instruction rows with four-step chain of thought",
        "build instructions toys --split loo --form cot --history 3 --targets-per-user 4 --negatives 3 "
        f"--parts train valid test --candidates {CANDIDATES} --name cot",
        "toys/instructions/cot/manifest.json",
    )
    launch, script, config = (
        str(recipe_path(name)) for name in ("launch/cpu.yaml", "sft.py", "configs/tiny/cot.yaml")
    )
    settings = f"--instructions toys/instructions/cot --out runs/qlora-cot --seed {options.seed}"
    yield Step(
        "QLoRA in four bits, the best step chosen by validation AUC",
        (
            *("accelerate", "launch", "--config_file", launch, script, "--config", config),
            *settings.split(),
            *("--max-steps", str(options.max_steps), "--valid-every", str(max(2, options.max_steps // 4))),
            *("--resume", "auto"),
        ),
        "runs/qlora-cot/metrics.json",
    )
    yield recllm(
        "yes/no scores of the test lists",
        "score yes-no toys/instructions/cot --run runs/qlora-cot --visual-store auto",
        "scores/qlora-cot.parquet",
    )
    yield recllm(
        "the same model before fine-tuning",
        "score yes-no toys/instructions/cot --model tiny --visual-store auto --name untrained",
        "scores/untrained.parquet",
    )
    yield recllm(
        "a baseline: popularity",
        f"score popularity {split} --candidates {CANDIDATES}",
        "scores/popularity.parquet",
    )
    yield recllm(
        "a baseline: mean profile of title and text embeddings",
        f"score profile {split} --candidates {CANDIDATES} --name text-profile",
        "scores/text-profile.parquet",
    )
    systems = " ".join(
        f"scores/{name}.parquet" for name in ("qlora-cot", "untrained", "popularity", "text-profile")
    )
    yield recllm(
        "the report",
        f"report {systems} runs/qlora-cot --candidates {lists}/test.parquet --dataset toys "
        "--instructions toys/instructions/cot --out report",
        "report/report.html",
    )
    yield recllm(
        "the figures",
        f"eval ranks {systems} --candidates {lists}/test.parquet --ks 1 5 10 --out metrics",
        "metrics",
    )

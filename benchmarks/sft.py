"""One step of supervised fine-tuning: `recipes/sft.py` against TRL's `SFTTrainer`, in turn in one run.

    python benchmarks/sft.py

Both train LoRA in float32 on the same rows in the same batches, with the same optimizer and seed, no dropout,
and loss on the completions alone. TRL is used as its documentation shows it for vision models: rows of
`prompt`, `completion` and `images`, its own collator, `peft_config`; it also labels what the template writes
after the answer's end, so here recllm does, too. The losses of every step must agree within 1e-4. TRL turns
gradient checkpointing on unless told otherwise, recllm does not; both are measured in both ways, and each is
compared with TRL in the same way. On a GPU TRL 1.16 projects onto the vocabulary where labels are, as recllm
does everywhere; on a CPU it projects every position, so that ratios measured on a CPU are not those of a GPU.
`recllm` computes once what a positive and its negative begin with; its `whole rows` (--no-share-prefixes) do
not.
Two settings: the embedded model on short rows with one image, and with --wide also random weights with the
vocabulary of Qwen2-VL on rows of about 1,000 tokens with nine images, which takes many minutes.

A step runs from the end of the step before to its own, batch and log line included. Every contender runs in a
process of its own, which waits for its turn after each step; figures are medians. Memory is the peak of the
resident set (on a GPU: of what torch allocates) above what is there when the model is loaded.

    python benchmarks/sft.py --smoke     the short setting with few steps, nothing written
"""

import contextlib
import io
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

from recllm.files import write_json
from recllm.mllm.tiny.architecture import Shape
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "sft.json"
SMOKE = "--smoke" in sys.argv
WARM_UP, ROUNDS = (1, 1) if SMOKE else (2, 9)
RANK, ALPHA, RATE, SEED = 16, 32, 1e-3, 0
INSTRUCTIONS = Path("instructions", "sft")
WAYS = (
    *itertools.product(("TRL", "recllm"), (False, True)),
    *itertools.product(("recllm, whole rows", "recllm, visual store"), (False,)),
)
"""Who, and whether with gradient checkpointing."""


@dataclass(frozen=True)
class Setting:
    """What is trained on what.

    Attributes:
        batch: Rows a step.
        history: Items before the target.
        shown: How the history is shown; the target is shown by title and image.
        shape: The sizes of a random model; None for the embedded one.
    """

    batch: int
    history: int
    shown: str
    shape: Shape | None = None
    rows: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "rows", (WARM_UP + ROUNDS + 2) * self.batch)  # batches are made one ahead


WIDE = Shape(
    layers=8,
    hidden=256,
    intermediate=1024,
    heads=8,
    kv_heads=4,
    vocabulary=151_936,
    rope_sections=(4, 6, 6),
    min_pixels=280 * 280,
    max_pixels=280 * 280,
    deviation=0.02,
)
SETTINGS = {"embedded": Setting(batch=16, history=3, shown="title")}
if "--wide" in sys.argv:
    SETTINGS["wide"] = Setting(batch=4, history=8, shown="image", shape=WIDE)

# ------------------------------------------------------------------------------------ the rows and the model


def prepare(setting: Setting, folder: Path) -> dict:
    """Writes dataset, instructions, model, tokens and visual store; returns what the rows are like."""
    from recllm.builders.instructions import build_instructions
    from recllm.builders.options import InstructionOptions
    from recllm.data.splits import SplitOptions, make_split
    from recllm.data.toyworld import generate
    from recllm.mllm.tiny import build_random
    from recllm.mllm.vision.of_dataset import open_visual_store
    from recllm.training.rows import training_rows

    dataset = generate(users=max(40, setting.rows), items=120).write(folder / "world")
    make_split(dataset, SplitOptions(dataset.folder, "loo"))
    build_instructions(
        InstructionOptions(
            dataset.folder,
            parts=("train",),
            preference="none",
            history=setting.history,
            history_as=setting.shown,
            name=INSTRUCTIONS.name,
        )
    )
    if setting.shape is not None:
        build_random(setting.shape, folder / "model")
    loaded, part = open_rows(setting, folder)
    open_visual_store("auto", loaded, part.dataset)
    rows = training_rows(loaded, part, folder / "rows", limit=setting.rows)
    labels = sum(row["length"] - row["start"] for row in rows)
    return {
        "tokens_per_row": sum(rows["length"]) / len(rows),
        "labels_per_row": labels / len(rows),
        "images_per_row": sum(map(len, rows["images"])) / len(rows),
        "vocabulary": loaded.model.config.get_text_config().vocab_size,
        "parameters": sum(each.numel() for each in loaded.model.parameters()),
    }


def open_rows(setting: Setting, folder: Path):
    from recllm.data.instructions import open_part
    from recllm.mllm.loading import load

    loaded = load(model_of(setting, folder), training=True)
    return loaded, open_part(folder / "world" / INSTRUCTIONS, "train")


def model_of(setting: Setting, folder: Path) -> str:
    return "tiny" if setting.shape is None else str(folder / "model")


# -------------------------------------------------------------------------------------------- the contenders


class NoValidation:
    """Stands where recllm scores candidate lists, which no measured step does."""

    def measure(self, model):
        return {"valid_auc": 0.5}


def ours(setting: Setting, folder: Path, run: Path, checkpointing: bool, who: str):
    """Returns the trainer of `recipes/sft.py`."""
    from recllm.data.instructions import open_part
    from recllm.mllm.vision.of_dataset import open_visual_store
    from recllm.training.folder import RunFolder
    from recllm.training.options import SFTOptions
    from recllm.training.rows import training_rows
    from recllm.training.sft import TrainingData, load_model, make_trainer

    instructions = folder / "world" / INSTRUCTIONS
    options = SFTOptions(
        model=model_of(setting, folder),
        instructions=instructions,
        method="lora",
        lora_rank=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        max_steps=WARM_UP + ROUNDS,
        batch_size=setting.batch,
        learning_rate=RATE,
        schedule="constant",
        warmup=0.0,
        seed=SEED,
        bf16="no",
        share_prefixes="whole rows" not in who,
        gradient_checkpointing=checkpointing,
        valid_every=float(setting.rows),
        logging_steps=1,
        out=run,
    )
    model = load_model(options)
    part = open_part(instructions, "train")
    rows = training_rows(model.loaded, part, folder / "rows", limit=setting.rows)
    rows = rows.remove_columns("end").add_column("end", rows["length"])
    store = open_visual_store("auto", model.loaded, part.dataset) if "store" in who else None
    data = TrainingData(rows, NoValidation(), (part, part), store)
    return make_trainer(options, RunFolder(run, (part, part)), model, data)


def theirs(setting: Setting, folder: Path, run: Path, checkpointing: bool):
    """Returns TRL's trainer on the rows in recllm's order."""
    import polars as pl
    from datasets import Dataset, Image, List
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from recllm.training.parts import LANGUAGE, Parts, lora_pattern
    from recllm.training.rows import training_rows
    from recllm.training.sampling import EpochSampler

    loaded, part = open_rows(setting, folder)
    rows = training_rows(loaded, part, folder / "rows", limit=setting.rows)
    order = list(EpochSampler(rows["group"], setting.batch, SEED, list(rows["length"])))
    table = pl.read_parquet(part.path)[order].select(
        "prompt",
        "completion",
        images=pl.col("images").list.eval(pl.format(f"{part.dataset}/{{}}", pl.element())),
    )
    rows = Dataset.from_list(table.to_dicts()).cast_column("images", List(Image()))
    arguments = SFTConfig(
        output_dir=str(run),
        max_steps=WARM_UP + ROUNDS,
        per_device_train_batch_size=setting.batch,
        train_sampling_strategy="sequential",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=SEED,
        bf16=False,
        gradient_checkpointing=checkpointing,
        max_length=None,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    layers = Parts(loaded.model).linear_layers((LANGUAGE,))
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=lora_pattern(layers))
    return SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=rows,
        processing_class=loaded.processor,
        peft_config=adapter,
    )


# ---------------------------------------------------------------------------------------------- the measure


class Memory:
    """Peak memory in MiB above what was there at the beginning."""

    def __init__(self):
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None
        if self._cuda:
            self._cuda.reset_peak_memory_stats()
            self._before = self._cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            self._before = _resident("VmRSS")

    def peak(self) -> float:
        peak = self._cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        return (peak - self._before) / 2**20


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def serve(setting: Setting, way: tuple[str, bool], folder: Path, pipe) -> None:
    """Trains a step for every message."""
    import torch
    from transformers import TrainerCallback
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
    who, checkpointing = way
    with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(io.StringIO()):
        if who == "TRL":
            trainer = theirs(setting, folder, Path(run), checkpointing)
        else:
            trainer = ours(setting, folder, Path(run), checkpointing, who)

        class Turns(TrainerCallback):
            def on_train_begin(self, *arguments, **named):
                self.memory = Memory()
                self.wait()

            def wait(self):
                if not pipe.recv():
                    raise SystemExit
                self.started = time.perf_counter()

            def on_log(self, args, state, control, logs=None, **named):
                if "loss" not in logs:
                    return
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                pipe.send((time.perf_counter() - self.started, logs["loss"], self.memory.peak()))
                self.wait()

        trainer.add_callback(Turns())
        trainer.train()


def measure(setting: Setting, folder: Path) -> list[dict]:
    """Returns a line of figures for each way to train."""
    context = multiprocessing.get_context("spawn")
    pipes, steps = {}, {way: [] for way in WAYS}
    for way in WAYS:
        pipes[way], remote = context.Pipe()
        context.Process(target=serve, args=(setting, way, folder, remote), daemon=True).start()
        remote.close()  # a contender that fails then ends the benchmark
    for _ in range(WARM_UP + ROUNDS):
        for way, pipe in pipes.items():
            pipe.send(True)
            steps[way].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    for number in range(WARM_UP + ROUNDS):
        losses = {way: steps[way][number][1] for way in WAYS}
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise SystemExit(f"step {number}: the losses differ: {losses}")
    return [figures_of(way, steps) for way in WAYS]


def figures_of(way: tuple[str, bool], steps: dict) -> dict:
    who, checkpointing = way
    mine, base = steps[way][WARM_UP:], steps["TRL", checkpointing][WARM_UP:]
    peak, base_peak = (max(step[2] for step in steps[each]) for each in (way, ("TRL", checkpointing)))
    figures = {
        "seconds": statistics.median(step[0] for step in mine),
        "peak_mib": peak,
        "time_ratio": statistics.median(b[0] / m[0] for m, b in zip(mine, base, strict=True)),
        "memory_ratio": base_peak / peak,
    }
    shown = "  ".join(f"{name} {value:9.3f}" for name, value in figures.items())
    print(f"{who:22}{'checkpointing' if checkpointing else '':15}{shown}", flush=True)
    losses = [step[1] for step in steps[way]]
    return {"way": who, "checkpointing": checkpointing, **figures, "losses": losses}


def main() -> None:
    import torch

    figures = {}
    for name, setting in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            about = prepare(setting, Path(folder))
            print(f"{name}:", *(f"{key} {value:,.0f}" for key, value in about.items()), flush=True)
            figures[name] = {**about, "setting": asdict(setting), "ways": measure(setting, Path(folder))}
    if SMOKE:
        return
    content = {
        "benchmark": "sft",
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "run": describe_run(),
        "setting": {"warm_up": WARM_UP, "rounds": ROUNDS, "lora_rank": RANK},
        "figures": figures,
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()

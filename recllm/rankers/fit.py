"""The one training loop of all rankers: any kind of example, any loss, early stopping on validation lists.

The same seed and initial weights give the same run, also where it is interrupted and resumed. Several
processes (`accelerate launch --num_processes N`) share each batch, and their gradients average to those of
one process, where rows do not meet in the loss (the contrasts of SMORE, HM4SR and MMSBR are among a process's
own rows) and nothing is drawn (dropout, what BERT4Rec hides). Validation ranks the whole catalog and opens
training and validation parts only.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from recllm.data.candidates import FullRanking, full_ranking
from recllm.data.splits import Split
from recllm.data.tables import read_users
from recllm.errors import DataError
from recllm.evaluation import compute_metrics, rank_catalog
from recllm.rankers.batches import Batch, Epochs
from recllm.rankers.criteria import BLOCK, Criterion, Loss
from recllm.rankers.launching import check_launch, check_precision
from recllm.rankers.plugins import Plugin
from recllm.rankers.ranker import Ranker, freeze_absent
from recllm.rankers.ranking import UserStates, check_users_are_served, some_lists
from recllm.rankers.saving import RunState, load_state, save_ranker, save_state
from recllm.rankers.training_data import TrainingData
from recllm.runs.log import Journal

METRICS = ("recall@10", "ndcg@10", "recall@20", "ndcg@20")
LOG = "log.jsonl"


@dataclass
class FitOptions:
    """How a ranker is trained."""

    # -- Loss ----------------------------------------------------------------------------------------------
    loss: Loss | None = None
    """ce: cross-entropy over the whole catalog. sampled-ce, bce, bpr, gbce: against drawn negatives. By
    default the ranker's own."""
    negatives: int = 1
    """Negatives a target, drawn from what the user has no training interaction with; not used by ce."""
    calibration: float = 0.75
    """t of gbce: 0 leaves scores as negative sampling inflates them, 1 calibrates them fully."""
    block: int = BLOCK
    """Scores held at a time by ce: bounds its memory, whatever the size of the catalog."""

    # -- Optimization (Adam) -------------------------------------------------------------------------------
    epochs: int = 200
    """Passes over the training examples at most."""
    batch_size: int = 256
    """Examples a step, over all processes: sequences, prefixes or pairs, as the ranker takes them."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    weight_decay: float = 0.0
    """Weight of the squared size of all parameters, added to gradients by Adam."""
    seed: int = 42
    """Settles initial weights (see `seed_weights`), order, negatives and dropout."""

    # -- Validation ----------------------------------------------------------------------------------------
    valid_every: int = 1
    """Epochs between validations."""
    valid_metric: str = "ndcg@10"
    """What is to grow: recall@10, ndcg@10, recall@20 or ndcg@20 over the whole catalog, seen items masked."""
    valid_users: int = 0
    """Validation lists, evenly over all; 0 for all."""
    valid_only: str | None = None
    """A table with a column `user`: only the validation lists of these users choose the epoch, so that those
    of others can be used for something else. By default those of all."""
    patience: int = 10
    """Validations without a gain after which training stops."""

    def check(self, ranker: type[Ranker], n_items: int) -> None:
        """Raises a `DataError` for values that make no sense, or not with this ranker and catalog."""
        least = {"epochs": 1, "batch_size": 1, "valid_every": 1, "patience": 1, "negatives": 1, "block": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                flag = name.replace("_", "-")
                raise DataError(f"--{flag} {getattr(self, name)}: expected {smallest} or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise DataError(f"--learning-rate {self.learning_rate}: expected a number above 0")
        if self.seed < 0 or self.valid_users < 0:
            raise DataError(f"--seed {self.seed} --valid-users {self.valid_users}: expected 0 or more")
        for name in ("weight_decay", "calibration"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DataError(f"--{name.replace('_', '-')} {value}: expected 0 or more")
        if self.valid_metric not in METRICS:
            raise DataError(f"--valid-metric {self.valid_metric}: expected one of {', '.join(METRICS)}")
        if self.loss is not None and self.loss not in ranker.losses:
            raise DataError(f"--loss {self.loss}: {ranker.__name__} takes {', '.join(ranker.losses)}")

        if (self.loss or ranker.losses[0]) != "ce" and self.negatives >= n_items:
            raise DataError(f"--negatives {self.negatives} of {n_items} items: expected fewer")

    def criterion(self, ranker: type[Ranker]) -> Criterion:
        """Returns the loss."""
        return Criterion(self.loss or ranker.losses[0], self.block, self.calibration)


@dataclass
class Fitted:
    """What came out of training.

    Attributes:
        best_epoch: The epoch whose weights the ranker has now, from 1.
        valid: Its validation metrics.
        epochs: Epochs that were trained.
        log: One line for each epoch.
    """

    best_epoch: int
    valid: dict[str, float]
    epochs: int
    log: list[dict[str, Any]] = field(default_factory=list)


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed; other allocators are left as they are.

    Giving large blocks back and taking them anew, page by page, costs up to a quarter of a step on a CPU.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # of malloc.h; the first is refused where it is too high
        if library.mallopt(mmap_threshold, 2**30) or library.mallopt(mmap_threshold, 2**25):
            library.mallopt(trim_threshold, 2**31 - 1)


def seed_weights(seed: int) -> None:
    """Settles the weights of the ranker that is made next; the same in every process."""
    torch.manual_seed(int(np.random.default_rng([seed, 0, 0]).integers(2**62)))


class _Step(nn.Module):
    """The loss as a module's forward, which is where DistributedDataParallel hears of it."""

    def __init__(self, ranker: Ranker, criterion: Criterion) -> None:
        super().__init__()
        self.ranker, self._criterion = ranker, criterion

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.ranker.loss(batch, self._criterion)


def fit(
    ranker: Ranker,
    data: TrainingData,
    split: Split,
    options: FitOptions,
    folder: Path | None = None,
    *,
    resume: bool = False,
    plugin: Plugin | None = None,
) -> Fitted:
    """Trains a ranker, and leaves it with the weights of its best validation.

    Args:
        ranker: The ranker; it is moved to the accelerator where there is one.
        data: What it was made from.
        split: The split whose validation lists choose the epoch.
        options: How.
        folder: Where model.safetensors (the best so far), log.jsonl and the state for a resumption go;
            nothing is written where None, and the best weights are held in memory.
        resume: Go on from the state in `folder`.
        plugin: What changes how it learns, such as `recllm.reveal.avl.AVL`.

    Raises:
        DataError: An option does not fit the ranker, the ranker cannot know any user of the validation lists,
            scores all items alike, or the loss is no longer a number; or the launch is one that rankers
            cannot be trained under.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    options.check(type(ranker), data.n_items)
    check_launch()
    check_users_are_served(type(ranker), split, "valid")
    alike = DistributedDataParallelKwargs(broadcast_buffers=False)  # every process makes them from one seed
    on_cpu = not torch.accelerator.is_available()  # unsaid, several processes on CPUs would stay alone
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[alike])
    check_precision(accelerator.mixed_precision)  # also set by an Accelerator that was made before this one
    rank, processes = accelerator.process_index, accelerator.num_processes
    if options.batch_size < processes:
        raise DataError(
            f"--batch-size {options.batch_size} for {processes} processes: expected one row for each"
        )
    criterion = options.criterion(type(ranker))
    epochs = Epochs(
        data,
        ranker.examples,
        batch_size=options.batch_size,
        length=getattr(ranker.config, "length", 0),
        negatives=0 if criterion.loss == "ce" else options.negatives,
        seed=options.seed,
        part=(rank, processes),
    )
    if not epochs.count:
        raise DataError(f"{split.folder}: no user has enough training interactions to learn from")
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    ranker.to(accelerator.device)
    freeze_absent(ranker, data)
    optimizer = torch.optim.Adam(
        ranker.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    plugin = plugin or Plugin()
    plugin.begin(ranker, criterion, optimizer, partial(accelerator.reduce, reduction="mean"))
    state = load_state(folder, ranker, optimizer) if resume and folder is not None else RunState()
    if state.epoch:
        plugin.load_state(state.plugin)
    step = accelerator.prepare(_Step(ranker, criterion))
    lists = _validation_lists(split, options, rank, processes)
    best = _Best(ranker, folder, rank)
    journal = Journal(folder / LOG, state.epoch) if folder is not None else None
    result = Fitted(state.best_epoch, state.valid, state.epoch, list(state.log))
    with _Progress(options, len(epochs), state, rank) as progress:
        for number in range(state.epoch, options.epochs):
            if state.validations_since >= options.patience:
                break
            started = time.perf_counter()
            loss = _train_epoch(
                step, ranker, optimizer, epochs, number, options, accelerator, plugin, progress
            )
            line = {"step": number + 1, "loss": loss, "seconds": time.perf_counter() - started}
            line |= plugin.numbers()
            state.epoch = result.epochs = number + 1
            if (number + 1) % options.valid_every == 0 or number + 1 == options.epochs:
                valid = _validate(ranker, data, split, lists, accelerator)
                line |= {f"valid_{name}": value for name, value in valid.items()}
                line["seconds_with_validation"] = time.perf_counter() - started
                if state.improves(options.valid_metric, valid):
                    state.best_epoch, state.valid, state.validations_since = number + 1, valid, 0
                    best.keep()
                else:
                    state.validations_since += 1
                progress.tell(number + 1, loss, valid, state)
            result.log.append(line)
            state.log, state.plugin = result.log, plugin.state()
            if rank == 0 and folder is not None:
                journal.write(line)
                save_state(folder, ranker, optimizer, state)
    if not state.best_epoch:
        raise DataError(
            f"--epochs {options.epochs}: {state.epoch} are done, and none of them was validated; give more"
        )
    accelerator.wait_for_everyone()
    best.restore()
    result.best_epoch, result.valid = state.best_epoch, state.valid
    accelerator.free_memory()
    return result


def _train_epoch(
    step: nn.Module,
    ranker: Ranker,
    optimizer: torch.optim.Optimizer,
    epochs: Epochs,
    number: int,
    options: FitOptions,
    accelerator: Any,
    plugin: Plugin,
    progress: _Progress,
) -> float:
    """Trains one epoch and returns its mean loss."""
    random = np.random.default_rng([options.seed, number, 1])
    ranker.train()
    ranker.begin_epoch(random)
    torch.manual_seed(
        int(np.random.default_rng([options.seed, number, 2, accelerator.process_index]).integers(2**62))
    )
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    steps = 0
    for batch, weight in epochs.epoch(number, accelerator.device):
        plugin.before_step(batch, weight)
        loss = step(batch) * weight
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
        plugin.after_backward()
        optimizer.step()
        total += loss.detach()
        steps += 1
        progress.advance()
    total = accelerator.reduce(total, "mean").item() / max(steps, 1)
    if not math.isfinite(total):
        raise DataError(
            f"epoch {number + 1}: the loss is {total}; a smaller --learning-rate helps, or features of a "
            "smaller size"
        )
    return total


def _validation_lists(split: Split, options: FitOptions, rank: int, processes: int) -> FullRanking:
    ranking = full_ranking(split, "valid")
    if options.valid_only is not None:
        named = set(read_users(Path(options.valid_only)))
        if unknown := named - set(ranking.user_ids):
            raise DataError(
                f"--valid-only {options.valid_only}: user {min(unknown)!r} has no validation target in "
                f"{split.folder}"
            )
        ranking = some_lists(ranking, np.flatnonzero([user in named for user in ranking.user_ids]))
    count = len(ranking.users)
    if 0 < options.valid_users < count:
        places = np.linspace(0, count - 1, options.valid_users).round().astype(np.int64)
    else:
        places = np.arange(count)
    return some_lists(ranking, places[rank::processes])


def _validate(
    ranker: Ranker, data: TrainingData, split: Split, lists: FullRanking, accelerator: Any
) -> dict[str, float]:
    """The metrics over all processes' lists.

    Raises:
        DataError: The ranker scores all items alike in every list; raised by each process.
    """
    sums = np.zeros(len(METRICS) + 2)
    if len(lists.users):
        states = UserStates(ranker, data, data.known_before(split, "valid"), lists.users.astype(np.int64))
        records = rank_catalog(lists, states.for_ranking(), system="validation")
        means = compute_metrics(records, names=list(METRICS)).mean()
        sums[:-2] = [means[name] * len(lists.users) for name in METRICS]
        sums[-2:] = len(lists.users), records.all_tied * len(lists.users)
    sums = accelerator.reduce(torch.tensor(sums, device=accelerator.device), "sum").cpu().numpy()
    count, tied = sums[-2:]
    if tied == count:
        raise DataError(
            f"{type(ranker).__name__} scores all items alike in each of the {int(count):,} validation lists "
            f"of {split.folder}: it may know none of their users, or training has collapsed (a smaller "
            "--learning-rate, other features or another seed may help)"
        )
    return {name: float(value / count) for name, value in zip(METRICS, sums[:-2], strict=True)}


class _Best:
    """Keeps the best weights so far, in the run's folder or in memory."""

    def __init__(self, ranker: Ranker, folder: Path | None, rank: int) -> None:
        self._ranker, self._folder, self._rank = ranker, folder, rank
        self._held: dict[str, torch.Tensor] | None = None

    def keep(self) -> None:
        if self._folder is None:
            self._held = {name: value.detach().clone() for name, value in self._ranker.state_dict().items()}
        elif self._rank == 0:
            save_ranker(self._folder, self._ranker)

    def restore(self) -> None:
        if self._folder is None:
            if self._held is not None:
                self._ranker.load_state_dict(self._held)
        else:
            from recllm.rankers.saving import load_weights

            load_weights(self._folder, self._ranker)


class _Progress:
    """One bar over all steps on rank 0's terminal; without a terminal, lines, and one for each validation."""

    def __init__(self, options: FitOptions, steps: int, state: RunState, rank: int) -> None:
        from recllm.progress import Progress

        self._rank, self._metric, self._shown = rank, options.valid_metric, rank == 0 and sys.stderr.isatty()
        self._bar = Progress(
            desc="training (at most)",
            total=options.epochs * steps,
            initial=state.epoch * steps,
            unit="step",
            disable=rank > 0,
            dynamic_ncols=True,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self) -> None:
        self._bar.update()

    def tell(self, epoch: int, loss: float, valid: dict[str, float], state: RunState) -> None:
        now, best = valid[self._metric], state.valid[self._metric]
        text = (
            f"epoch {epoch}: loss {loss:.4f}, {self._metric} {now:.4f}, best {best:.4f} ({state.best_epoch})"
        )
        if self._shown:
            self._bar.set_description(text, refresh=False)
        elif self._rank == 0:
            print(text, flush=True)

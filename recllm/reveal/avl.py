"""AVL, Adaptive Visual Learning: the part of REVEAL (arXiv 2606.09082) that reweights what images teach.

In step x let L^v be the whole training loss of the batch without texts (vision-only) and L^t the one without
images (text-only), both computed without gradients, in training mode, with what items have by their number
("id") in place. The modality that is left out is zero after its projection, in the sequence and in the
candidates.

    r    = exp(L^v - L^t)                            the gap of this batch                  REVEAL eq. 9, 10
    rbar = exp(mean L^v - mean L^t)                  over all steps until now, this one too  REVEAL eq. 11, 12
    K    = exp(alpha (r - rbar)), in [0.1, 10]       above 1 where images do worse than usual  REVEAL eq. 13
    gradient of theta_v  <-  K gradient of theta_v   theta_v: the parameters of images alone  REVEAL eq. 14

theta_v is what the ranker declares, `parameters_of("image")`. There are three forms:

    gradients  REVEAL eq. 14, the paper's.
    updates    Ours: Adam's step of theta_v is scaled by K, and its moments are left as they are (the same as
               a learning rate K times as large). Adam divides a gradient by its recent size, so that a factor
               that stays the same cancels: with it, `gradients` acts through the fluctuations of K alone.
               REVEAL eq. 15 is written for SGD, with which both forms are the same.
    two-sided  The release's older form, after AGM (Li et al., ICCV 2023): with s = -L,
                   K_v = exp(-alpha (exp(s_v - s_t) - exp(mean s_v - mean s_t))), in [0.2, 2]
               scales the gradients of images, and K_t, with v and t exchanged, those of texts.

With `--without text` the step itself is vision-only, and L^t is what numbers alone achieve (the paper's
"V-Only + AVL").

Ours: the mean can be exponential (`ema`), as the plain one lags behind losses that fall. It starts as the
plain mean of the first 1 / (1 - decay) steps. Both passes begin with the random numbers that the step will
draw (dropout), and leave them as they were; with alpha 0 the weights are to the bit those of training without
AVL. Over several processes L^v and L^t are those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.options import TrainRankerOptions
from recllm.rankers.plugins import Plugin
from recllm.rankers.ranker import Ranker

Form = Literal["gradients", "updates", "two-sided"]
Mean = Literal["cumulative", "ema"]
BOUNDS: dict[Form, tuple[float, float]] = {
    "gradients": (0.1, 10.0),
    "updates": (0.1, 10.0),
    "two-sided": (0.2, 2.0),
}
"""The least and the largest K; of the release, the paper has none."""
ALPHA, DECAY = 0.1, 0.99
_LARGEST_EXPONENT = 700.0  # exp of more is infinite


@dataclass
class MeanLosses:
    """The means of both losses over the steps until now.

    Attributes:
        steps: How many.
        image: Mean vision-only loss.
        text: Mean text-only loss.
    """

    steps: int = 0
    image: float = 0.0
    text: float = 0.0

    def add(self, image: float, text: float, decay: float | None) -> None:
        """Takes the losses of a step; `decay` None keeps the cumulative mean of REVEAL eq. 11."""
        self.steps += 1
        share = 1 / self.steps if decay is None else max(1 / self.steps, 1 - decay)
        self.image += share * (image - self.image)
        self.text += share * (text - self.text)


def gap(image: float, text: float) -> float:
    """Returns r or rbar of vision-only and text-only losses (REVEAL eq. 10, 12)."""
    return math.exp(min(image - text, _LARGEST_EXPONENT))


def factors(form: Form, alpha: float, image: float, text: float, means: MeanLosses) -> dict[str, float]:
    """Returns K of each modality that the form scales (REVEAL eq. 13)."""
    least, most = BOUNDS[form]

    def factor(exponent: float) -> float:
        return min(max(math.exp(min(exponent, _LARGEST_EXPONENT)), least), most)

    if form == "two-sided":
        return {
            "image": factor(-alpha * (gap(text, image) - gap(means.text, means.image))),
            "text": factor(-alpha * (gap(image, text) - gap(means.image, means.text))),
        }
    return {"image": factor(alpha * (gap(image, text) - gap(means.image, means.text)))}


class AVL(Plugin):
    """The plug-in of `fit`.

    Args:
        form: What is scaled.
        alpha: How strongly; 0 measures the gaps and scales nothing.
        decay: Of the exponential mean; None for the cumulative one.

    Attributes:
        factors: K of the latest step, by modality.
    """

    def __init__(self, form: Form = "gradients", alpha: float = ALPHA, decay: float | None = None) -> None:
        self.form, self.alpha, self.decay = form, alpha, decay
        self.factors: dict[str, float] = {}
        self._means = MeanLosses()
        self._epoch = _EpochNumbers()

    @classmethod
    def of(cls, options: TrainRankerOptions) -> AVL | None:
        """Returns the plug-in that the options ask for; None where they do not.

        Raises:
            DataError: An option cannot work or has no effect, or the ranker does not read both modalities.
        """
        if options.avl is None:
            for name in ("alpha", "mean", "decay"):
                if getattr(options, f"avl_{name}") is not None:
                    raise DataError(f"--avl-{name} is an option of AVL: give --avl too, or leave it out")
            return None
        _check_modalities(options)
        alpha = ALPHA if options.avl_alpha is None else options.avl_alpha
        if not (math.isfinite(alpha) and alpha >= 0):
            raise DataError(f"--avl-alpha {alpha}: expected 0 or more")
        if options.avl_mean != "ema":
            if options.avl_decay is not None:
                raise DataError("--avl-decay is an option of --avl-mean ema: give that, or leave it out")
            return cls(options.avl, alpha)
        decay = DECAY if options.avl_decay is None else options.avl_decay
        if not 0 < decay < 1:
            raise DataError(f"--avl-decay {decay}: expected a number between 0 and 1")
        return cls(options.avl, alpha, decay)

    def begin(
        self,
        ranker: Ranker,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        """Finds the parameters that are scaled; `updates` gives them an optimizer group of their own."""
        self._ranker, self._criterion, self._mean = ranker, criterion, mean
        scaled = ("image", "text") if self.form == "two-sided" else ("image",)
        self._parameters = {name: [each for _, each in ranker.parameters_of(name)] for name in scaled}
        if self.form == "updates":
            self._group = _own_group(optimizer, self._parameters["image"])
            self._learning_rate = self._group["lr"]

    def before_step(self, batch: Batch, weight: float) -> None:
        """Computes both losses and K."""
        image, text = self._unimodal_losses(batch, weight)
        if not (math.isfinite(image) and math.isfinite(text)):
            raise DataError(
                f"AVL: the vision-only loss is {image} and the text-only loss {text}; a smaller "
                "--learning-rate helps, or features of a smaller size"
            )
        self._means.add(image, text, self.decay)
        self.factors = factors(self.form, self.alpha, image, text, self._means)
        self._epoch.add(image, text, self.factors)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Scales the gradients, or the learning rate of the coming update."""
        if self.form == "updates":
            self._group["lr"] = self._learning_rate * self.factors["image"]
            return
        for name, parameters in self._parameters.items():
            gradients = [each.grad for each in parameters if each.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, self.factors[name])

    def numbers(self) -> dict[str, float]:
        """Returns the epoch's K, gaps and losses, and begins the next epoch."""
        numbers = self._epoch.means() | {"avl_reference": gap(self._means.image, self._means.text)}
        self._epoch = _EpochNumbers()
        return numbers

    def state(self) -> dict[str, Any]:
        """Returns the mean losses and the number of their steps."""
        return {"avl": asdict(self._means)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes the mean losses of an interrupted run."""
        if "avl" not in state:
            raise DataError("the run was interrupted in training without AVL; resume it without --avl")
        self._means = MeanLosses(**state["avl"])

    @torch.no_grad()
    def _unimodal_losses(self, batch: Batch, weight: float) -> tuple[float, float]:
        """Returns L^v and L^t of the whole batch (REVEAL eq. 5 to 8)."""
        device = batch.users.device
        losses = []
        for left_out in ("text", "image"):
            with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
                losses.append(self._ranker.loss(batch, self._criterion, without=(left_out,)))
        image, text = self._mean(torch.stack(losses).double() * weight).tolist()
        return image, text


class _EpochNumbers:
    """Sums over the steps of an epoch."""

    def __init__(self) -> None:
        self._steps = 0
        self._sums: dict[str, float] = {}
        self._least, self._most = math.inf, -math.inf

    def add(self, image: float, text: float, found: dict[str, float]) -> None:
        """Takes the losses and the factors of a step."""
        step = {"avl_k": found["image"], "avl_gap": gap(image, text)}
        step |= {"avl_loss_image": image, "avl_loss_text": text}
        if "text" in found:
            step["avl_k_text"] = found["text"]
        self._steps += 1
        for name, value in step.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._least, self._most = min(self._least, found["image"]), max(self._most, found["image"])

    def means(self) -> dict[str, float]:
        """Returns the means, and the least and the largest K."""
        means = {name: value / self._steps for name, value in self._sums.items()}
        return means | {"avl_k_min": self._least, "avl_k_max": self._most} if means else {}


def _own_group(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> dict[str, Any]:
    """Moves parameters from the optimizer's only group to one of their own, with the same options."""
    (group,) = optimizer.param_groups
    own = {id(each) for each in parameters}
    group["params"] = [each for each in group["params"] if id(each) not in own]
    optimizer.add_param_group({**group, "params": parameters})
    return optimizer.param_groups[-1]


def _check_modalities(options: TrainRankerOptions) -> None:
    """Raises a `DataError` where there is no image to scale, or no text to compare it with."""
    what = f"--avl {options.avl}"
    missing = [name for name in ("image", "text") if name not in options.features_read()]
    if missing:
        raise DataError(
            f"{what}: {options.ranker} reads no {' and no '.join(missing)}, and AVL compares what a ranker "
            "makes of images with what it makes of texts; take one that reads both, such as hm4sr"
        )
    if options.without == "image" or (options.without and options.avl == "two-sided"):
        raise DataError(f"{what} --without {options.without}: AVL would have no {options.without} to scale")
    for name in ("image", "text"):
        if getattr(options, name) == "none":
            raise DataError(f"{what} --{name} none: AVL compares images with texts; give the {name}s too")

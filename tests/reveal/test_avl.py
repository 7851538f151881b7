"""AVL: equal to a NumPy re-implementation, apart from everything else that a step does, and resumable."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recllm.errors import DataError
from recllm.rankers.batches import Batch
from recllm.rankers.criteria import Criterion
from recllm.rankers.options import options_class
from recllm.rankers.plugins import Plugin
from recllm.rankers.ranker import Ranker, Without
from recllm.reveal.avl import AVL, Form
from tests.rankers.small_rankers import MODALITIES, made, training_batches

STEPS, ROWS, RATE, ALPHA = 50, 8, 0.05, 0.7
FORMS = ("gradients", "updates", "two-sided")
MULTIMODAL = [name for name, modality in MODALITIES if modality == "image" and (name, "text") in MODALITIES]
STREAM = np.random.default_rng(0)
IMAGES, TEXTS, NOISE = STREAM.normal(size=(3, STEPS, ROWS))
TARGETS = 3 * IMAGES - 0.5 * TEXTS + 0.1 * NOISE


class TwoParameters(Ranker):
    """Predicts w_image x + w_text y. The rows of a batch carry the step in `users`."""

    modality_parts = {"image": ("image",), "text": ("text",)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Parameter(torch.tensor(0.2, dtype=torch.float64)) for _ in range(2))

    def loss(self, batch: Batch, criterion: Criterion | None = None, *, without: Without = ()) -> Tensor:
        step = int(batch.users[0])
        images, texts, targets = (torch.from_numpy(each[step]) for each in (IMAGES, TEXTS, TARGETS))
        found = self.image * images * ("image" not in without) + self.text * texts * ("text" not in without)
        return (found - targets).square().mean()


def trained_with_torch(form: Form, optimizer: str, decay: float | None) -> np.ndarray:
    """The parameters after each step, and K of the image; shape [STEPS, 3]."""
    model, avl = TwoParameters(), AVL(form, ALPHA, decay)
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    stepper = kinds[optimizer](model.parameters(), lr=RATE)
    avl.begin(model, Criterion("ce"), stepper, lambda each: each)
    path = []
    for step in range(STEPS):
        batch = Batch(torch.tensor([step]), torch.zeros(1, 0, dtype=torch.int64))
        avl.before_step(batch, 1.0)
        stepper.zero_grad()
        model.loss(batch).backward()
        avl.after_backward()
        stepper.step()
        path.append([model.image.item(), model.text.item(), avl.factors["image"]])
    return np.array(path)


def trained_with_numpy(form: Form, optimizer: str, decay: float | None) -> np.ndarray:
    """The same, from the equations alone."""
    w = np.array([0.2, 0.2])
    first, second = np.zeros(2), np.zeros(2)
    history, path = [], []
    for step in range(STEPS):
        x = np.stack([IMAGES[step], TEXTS[step]])
        losses = [np.mean((w[each] * x[each] - TARGETS[step]) ** 2) for each in (0, 1)]
        history.append(losses)
        if decay is None:
            mean = np.mean(history, 0)
        else:
            mean = np.array(losses) if step == 0 else mean + max(1 / (step + 1), 1 - decay) * (losses - mean)
        difference, usual = losses[0] - losses[1], mean[0] - mean[1]
        if form == "two-sided":
            with np.errstate(over="ignore"):
                k = np.exp(-ALPHA * (np.exp([-difference, difference]) - np.exp([-usual, usual])))
            k = np.clip(k, 0.2, 2.0)
        else:
            k = np.array([np.clip(np.exp(ALPHA * (np.exp(difference) - np.exp(usual))), 0.1, 10.0), 1.0])
        gradient = 2 * ((w @ x - TARGETS[step]) * x).mean(1)
        after = np.ones(2)
        if form == "updates":
            after = k
        else:
            gradient = k * gradient
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            w = w - RATE * after * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        else:
            w = w - RATE * after * gradient
        path.append([*w, k[0]])
    return np.array(path)


@pytest.mark.parametrize("decay", [None, 0.8])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("form", FORMS)
def test_fifty_steps_equal_a_numpy_implementation(form: Form, optimizer: str, decay: float | None):
    found, expected = (each(form, optimizer, decay) for each in (trained_with_torch, trained_with_numpy))
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert np.ptp(found[:, 2]) > 0.2  # K was at work


def test_with_sgd_both_forms_are_one_and_with_adam_they_are_not():
    paths = {
        (form, optimizer): trained_with_torch(form, optimizer, None)[:, :2]
        for form in ("gradients", "updates")
        for optimizer in ("sgd", "adam")
    }
    assert np.allclose(paths["gradients", "sgd"], paths["updates", "sgd"], rtol=1e-9)
    assert np.abs(paths["gradients", "adam"] - paths["updates", "adam"]).max() > 1e-3


def test_a_constant_k_cancels_in_adam_unless_the_update_is_scaled():
    """Why `updates` is there: Adam divides the gradient by its size."""

    def end(form: Form, factor: float) -> float:
        torch.manual_seed(0)
        model, avl = TwoParameters(), AVL(form, 0.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE, eps=1e-16)
        avl.begin(model, Criterion("ce"), optimizer, lambda each: each)
        for step in range(10):
            optimizer.zero_grad()
            model.loss(Batch(torch.tensor([step]), torch.zeros(1, 0, dtype=torch.int64))).backward()
            avl.factors = {"image": factor}
            avl.after_backward()
            optimizer.step()
        return model.image.item()

    assert end("gradients", 3.0) == pytest.approx(end("gradients", 1.0), abs=1e-9)
    assert abs(end("updates", 3.0) - end("updates", 1.0)) > 0.1


@pytest.mark.parametrize("alpha", [1e6, 1e300])
def test_k_stays_within_its_bounds(alpha: float):
    for form, bounds in (("gradients", (0.1, 10.0)), ("two-sided", (0.2, 2.0))):
        avl = AVL(form, alpha)
        avl.begin(
            TwoParameters(), Criterion("ce"), torch.optim.SGD([torch.zeros(1)], lr=1), lambda each: each
        )
        found = set()
        for step in range(12):
            avl.before_step(Batch(torch.tensor([step]), torch.zeros(1, 0, dtype=torch.int64)), 1.0)
            found.add(avl.factors["image"])
        assert set(bounds) <= found <= {*bounds, 1.0}


def stepped(name: str, plugin: Plugin, random: int = 5) -> tuple[Ranker, Tensor, Tensor, Tensor]:
    """A ranker with dropout after a step's backward; its loss, and the random numbers that come next."""
    model = copy.deepcopy(made(name)).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    criterion = Criterion(model.losses[0])
    plugin.begin(model, criterion, torch.optim.Adam(model.parameters()), lambda each: each)
    batch = next(training_batches(model))
    torch.manual_seed(random)
    plugin.before_step(batch, 1.0)
    before = torch.random.get_rng_state()
    loss = model.loss(batch, criterion)
    loss.backward()
    plugin.after_backward()
    return model, loss.detach(), before, torch.rand(3)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_gradients_of_images_alone_are_scaled_and_the_step_is_as_it_was(name: str):
    """Parameters are those that the ranker declares. By substrings of names, as in the release, `image` would
    take what is shared and miss what is named otherwise."""
    plain, loss, random, drawn = stepped(name, Plugin())
    avl = AVL("gradients", 50.0)
    avl._means.add(1.0, 1.0, None)  # a step before, so that K is not 1
    model, again, kept, next_drawn = stepped(name, avl)
    assert torch.equal(again, loss) and torch.equal(kept, random) and torch.equal(next_drawn, drawn)
    k = avl.factors["image"]
    assert abs(k - 1) > 1e-4
    images = {key for key, _ in model.parameters_of("image")}
    others = dict(plain.named_parameters())
    changed = 0
    for key, parameter in model.named_parameters():
        expected, gradient = others[key].grad, parameter.grad
        if expected is None:
            assert gradient is None
            continue
        assert torch.equal(gradient, expected * k if key in images else expected), key
        changed += int(key in images and not torch.equal(gradient, expected))
    assert changed


@pytest.mark.parametrize("name", MULTIMODAL)
def test_losses_are_those_without_a_modality_by_the_random_numbers_of_the_step(name: str):
    avl = AVL("two-sided", 0.0)
    model, *_ = stepped(name, avl)
    batch, criterion = next(training_batches(model)), Criterion(model.losses[0])
    expected = {}
    for modality, left_out in (("image", "text"), ("text", "image")):
        torch.manual_seed(5)
        with torch.no_grad():
            expected[modality] = model.loss(batch, criterion, without=(left_out,)).item()
    numbers = avl.numbers()
    assert numbers["avl_loss_image"] == pytest.approx(expected["image"], rel=1e-6)
    assert numbers["avl_loss_text"] == pytest.approx(expected["text"], rel=1e-6)
    assert numbers["avl_gap"] == pytest.approx(math.exp(expected["image"] - expected["text"]), rel=1e-5)
    assert numbers["avl_reference"] == pytest.approx(numbers["avl_gap"], rel=1e-9)  # of one step
    assert numbers["avl_k"] == numbers["avl_k_min"] == numbers["avl_k_max"] == numbers["avl_k_text"] == 1


def test_a_loss_that_is_no_number_is_told():
    class Broken(TwoParameters):
        def loss(self, batch: Batch, criterion: Criterion | None = None, *, without: Without = ()) -> Tensor:
            return super().loss(batch) * (math.nan if "text" in without else 1)

    avl = AVL()
    model = Broken()
    avl.begin(model, Criterion("ce"), torch.optim.SGD(model.parameters(), lr=1), lambda each: each)
    with pytest.raises(DataError, match="vision-only loss is nan"):
        avl.before_step(Batch(torch.tensor([0]), torch.zeros(1, 0, dtype=torch.int64)), 1.0)


def test_a_state_is_of_its_plug_in():
    avl = AVL()
    with pytest.raises(DataError, match="resume it without --avl"):
        avl.load_state({})
    with pytest.raises(DataError, match="plug-in"):
        Plugin().load_state(avl.state())


@pytest.mark.parametrize(
    ("ranker", "options", "told"),
    [
        ("sasrec", {"avl": "gradients"}, "sasrec reads no image and no text"),
        ("unisrec", {"avl": "updates"}, "unisrec reads no image, and"),
        ("vbpr", {"avl": "gradients", "image": "none"}, "--avl gradients --image none"),
        ("hm4sr", {"avl_alpha": 0.1}, "--avl-alpha is an option of AVL"),
        ("hm4sr", {"avl_mean": "ema"}, "--avl-mean is an option of AVL"),
        ("hm4sr", {"avl": "gradients", "avl_alpha": -1.0}, "--avl-alpha -1.0: expected 0 or more"),
        ("hm4sr", {"avl": "gradients", "avl_alpha": math.nan}, "--avl-alpha nan"),
        ("hm4sr", {"avl": "gradients", "avl_decay": 0.9}, "--avl-decay is an option of --avl-mean ema"),
        ("hm4sr", {"avl": "gradients", "avl_mean": "ema", "avl_decay": 1.0}, "--avl-decay 1.0"),
    ],
)
def test_options_that_cannot_work_are_refused(ranker: str, options: dict, told: str):
    with pytest.raises(DataError, match=told):
        AVL.of(options_class(ranker)(ranker=ranker, **options))


def test_options_reach_the_plug_in():
    kind = options_class("hm4sr")
    assert AVL.of(kind(ranker="hm4sr")) is None
    avl = AVL.of(kind(ranker="hm4sr", avl="gradients"))
    assert (avl.form, avl.alpha, avl.decay) == ("gradients", 0.1, None)
    avl = AVL.of(kind(ranker="hm4sr", avl="updates", avl_alpha=0.0, avl_mean="ema", avl_decay=0.5))
    assert (avl.form, avl.alpha, avl.decay) == ("updates", 0.0, 0.5)
    assert AVL.of(kind(ranker="hm4sr", avl="two-sided", avl_mean="ema")).decay == 0.99

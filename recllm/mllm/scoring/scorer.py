"""The scorer: groups of prompts in, log-odds of yes against no out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from recllm.errors import DataError
from recllm.mllm.prefix.attention import DEVICES, shared_prefix_attention
from recllm.mllm.prefix.groups import Group, Prompt, halves, plan, plan_padded, share
from recllm.mllm.prefix.inputs import packed, padded
from recllm.mllm.scoring.answers import (
    AnswerHead,
    Answers,
    Probability,
    check_head,
    paper_probability,
    paper_score,
)
from recllm.mllm.vision.encoded import EncodedImages, StoredImages, UnusableImage

if TYPE_CHECKING:
    from pathlib import Path

    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore

SHARED_PREFIX, FULL_PROMPTS = "shared prefix", "full prompts"
_FAMILIES = {
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"),
    *("llava", "llava_next", "idefics3", "smolvlm"),
}
_DECODERS = {
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen2", "qwen3"),
    *("llama", "mistral"),
}
_ROPES = {
    "default",
    "linear",
    "yarn",
    "mrope",
    "llama3",
}  # whose angles do not depend on a batch's longest prompt
_PACKS = "support_avx512bf16_for_cpu"
_CPU_BATCH = 4096
_BATCH_BOUNDS = (2048, 65_536)


@dataclass(frozen=True)
class Scored:
    """The scores of one batch.

    Attributes:
        rows: Each prompt's place in the table.
        margin: Log-odds of yes against no, float32.
        outside: Probability mass of neither, float32.
        computed: Tokens that the model went through.
        full: Tokens of the same prompts one by one.
    """

    rows: list[int]
    margin: np.ndarray
    outside: np.ndarray
    computed: int
    full: int


@dataclass(frozen=True)
class _Batch:
    groups: list[Group]
    pixels: Mapping[str, Future]


class YesNoScorer:
    """Scores prompts by how much sooner a model would answer yes than no.

    The model is switched to inference while it scores, and back after; its weights are read as they are at
    that moment, so that one scorer serves a whole training.

    Attributes:
        loaded: The model.
        method: `shared prefix`: what the prompts of a group have in common is computed once. `full prompts`:
            each prompt by itself, for models whose attention is not causal throughout (Gemma 3), or is of a
            kind that has not been tried.
        answers: The tokens that count as yes and as no.
        identity: What decides a score besides the prompt; JSON types only.
        batch_tokens: The most tokens in a batch; lowered where the accelerator has too little memory.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        visual_store: VisualStore | None = None,
        yes: Sequence[str] = (),
        no: Sequence[str] = (),
        probability: Probability = "sigmoid",
        batch_tokens: int | None = None,
        workers: int = 2,
    ) -> None:
        """Makes a scorer of a loaded model.

        Args:
            loaded: The model; a trainer's, too, but not in its wrappers (DDP, accelerate).
            visual_store: Read visual tokens from it; it must have every image.
            yes: Forms of the answer yes, each of one token; without any, the first token of "Yes.".
            no: As `yes`, for "No.".
            probability: `sigmoid` of the margin, or `paper`, see
                `recllm.mllm.scoring.answers.paper_probability`.
            batch_tokens: The most tokens in a batch; None: 4,096 on the CPU, by free memory on a GPU.
            workers: Threads that decode images.

        Raises:
            DataError: An answer form is not one token, or the output layer cannot be read.
        """
        if probability not in get_args(Probability):
            raise DataError(f"probability {probability!r}: expected sigmoid or paper")
        for name, value in (("batch_tokens", batch_tokens), ("workers", workers)):
            if value is not None and value < 1:
                raise DataError(f"{name} {value}: expected 1 or more")
        check_head(loaded.base_model)
        self.loaded = loaded
        self.answers = Answers.find(loaded, yes, no)
        self.method = SHARED_PREFIX if can_share_prefix(loaded.base_model) else FULL_PROMPTS
        self.batch_tokens = batch_tokens or _default_batch(loaded.base_model)
        self._probability, self._store, self._workers = probability, visual_store, workers
        self.identity = {
            **loaded.identity,
            "yes": list(self.answers.yes),
            "no": list(self.answers.no),
            "probability": probability,
            "visual_store": None if visual_store is None else visual_store.manifest["dtype"],
            "method": self.method,
        }

    def probability(self, margin: np.ndarray, outside: np.ndarray) -> np.ndarray:
        """Returns the probability of yes, of the kind that was asked for: float32, or float64 of `paper`."""
        margins, masses = torch.from_numpy(margin), torch.from_numpy(outside)
        if self._probability == "sigmoid":
            return torch.sigmoid(margins).numpy()
        return paper_probability(margins, masses).numpy()

    def score(self, margin: np.ndarray, outside: np.ndarray) -> np.ndarray:
        """Returns what prompts are ranked by: the margin, or what orders as `paper`'s probability does."""
        if self._probability == "sigmoid":
            return margin
        return paper_score(torch.from_numpy(margin), torch.from_numpy(outside)).numpy()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Yields what scores while the model's weights stay the same; the model is in inference mode."""
        images = (
            EncodedImages(self.loaded, self._workers)
            if self._store is None
            else StoredImages(self.loaded, self._store)
        )
        training = [module for module in self.loaded.model.modules() if module.training]
        self.loaded.model.eval()
        # In inference, bitsandbytes packs 4-bit weights anew for some CPUs, and what is packed so passes no
        # gradient when training goes on.
        packing = [module for module in training if getattr(module, _PACKS, False)]
        for module in packing:
            setattr(module, _PACKS, False)
        try:
            yield Session(self, images)
        finally:
            for module in training:
                module.training = True
            for module in packing:
                setattr(module, _PACKS, True)
            images.close()


class Session:
    """A scorer at work; see `YesNoScorer.session`."""

    def __init__(self, scorer: YesNoScorer, images: EncodedImages | StoredImages) -> None:
        self._scorer, self._loaded, self._images = scorer, scorer.loaded, images

    def key_of(self, path: Path) -> str:
        """Returns an image file's key. Raises a DataError where the visual store does not have it."""
        return self._images.key(path)

    def score(
        self,
        units: Iterable[Callable[[], list[list[Prompt]]]],
        paths: Mapping[str, Path],
        done: Collection[int] = (),
    ) -> Iterator[Scored]:
        """Scores groups of prompts, and reads the next while the model works on one batch.

        Args:
            units: Each returns the prompts of some groups; batches are formed within a unit, the same
                whenever it is scored.
            paths: A file of each image, by key.
            done: Rows that have scores; a batch of such rows alone is left out.

        Yields:
            Scores, batch by batch.

        Raises:
            DataError: A prompt cannot be read, or one alone does not fit the memory.
        """
        batches = self._batches(units, paths, done)
        ahead = ThreadPoolExecutor(1, thread_name_prefix="batch")
        try:
            upcoming = ahead.submit(next, batches, None)
            while (batch := upcoming.result()) is not None:
                upcoming = ahead.submit(next, batches, None)
                yield from self._score(batch.groups, batch.pixels)
        finally:
            ahead.shutdown(cancel_futures=True)

    def _batches(
        self,
        units: Iterable[Callable[[], list[list[Prompt]]]],
        paths: Mapping[str, Path],
        done: Collection[int],
    ) -> Iterator[_Batch]:
        scorer = self._scorer
        form = plan if scorer.method == SHARED_PREFIX else plan_padded
        for read in units:
            groups = [share(prompts) for prompts in read()]
            for batch in form(groups, scorer.batch_tokens):
                prompts = [prompt for group in batch for prompt in group.prompts]
                if all(prompt.row in done for prompt in prompts):
                    continue
                shown = {key: paths[key] for prompt in prompts for key in prompt.images}
                yield _Batch(batch, self._images.ahead(shown))

    def _score(self, batch: list[Group], pixels: Mapping[str, Future]) -> Iterator[Scored]:
        try:
            scored = self._run(batch, pixels)
        except torch.OutOfMemoryError:
            scored = None
        if scored is not None:
            yield scored
            return
        parts = halves(batch)
        if len(parts) == 1:
            prompt = batch[0].prompts[0]
            raise DataError(
                f"sample {prompt.id!r}: its {len(prompt.tokens):,} tokens need more memory than the "
                "accelerator has; lower --max-pixels, or build the instructions with --max-prompt-tokens"
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for part in parts:
            size = sum(group.tokens for group in part)
            self._scorer.batch_tokens = min(self._scorer.batch_tokens, size)
            yield from self._score(part, pixels)

    @torch.no_grad()
    def _run(self, batch: list[Group], pixels: Mapping[str, Future]) -> Scored:
        loaded, scorer = self._loaded, self._scorer
        model = loaded.base_model
        prompts = [prompt for group in batch for prompt in group.prompts]
        grids = self._grids(prompts, pixels)
        shared = scorer.method == SHARED_PREFIX
        inputs = packed(loaded, batch, grids) if shared else padded(loaded, batch)
        arguments = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in (inputs.arguments | self._images.inputs(inputs.images)).items()
        }
        core = model.base_model
        with shared_prefix_attention(model.get_decoder()) if shared else nullcontext():
            hidden = core(**arguments, use_cache=False).last_hidden_state
        rows, columns = (place.to(hidden.device) for place in inputs.last)
        with AnswerHead.read(model) as head:
            margin, outside = head.margins(hidden[rows, columns], scorer.answers)
        if not torch.isfinite(margin).all():
            place = int((~torch.isfinite(margin)).nonzero()[0])
            raise DataError(
                f"sample {prompts[place].id!r}: its score is {margin[place].item()}; the model's numbers "
                "overflow, so load it with --dtype bfloat16 or float32"
            )
        return Scored(
            [prompt.row for prompt in prompts],
            margin.cpu().numpy(),
            outside.cpu().numpy(),
            inputs.arguments["input_ids"].numel(),
            sum(len(prompt.tokens) for prompt in prompts),
        )

    def _grids(self, prompts: list[Prompt], pixels: Mapping[str, Future]) -> dict[str, list[int]]:
        """The grid of each image of a batch, which is encoded with it; nothing where a model has no grids."""
        keys = list(dict.fromkeys(key for prompt in prompts for key in prompt.images))
        try:
            return self._images.grids(keys, pixels)
        except UnusableImage as error:
            sample = next(prompt.id for prompt in prompts if error.key in prompt.images)
            raise DataError(f"sample {sample!r}: {error}") from None


def can_share_prefix(model: Any) -> bool:
    """Tells whether a model's prompts may share a prefix: causal attention in every layer, of a tried family.

    Args:
        model: The transformers model itself.
    """
    text = model.config.get_text_config()
    layers = getattr(text, "layer_types", None)
    windowed = layers is None and getattr(text, "sliding_window", None) is not None  # Mistral 7B of 2023
    return (
        model.config.model_type in _FAMILIES
        and text.model_type in _DECODERS
        and set(layers or ["full_attention"]) == {"full_attention"}
        and not windowed
        and getattr(text, "is_causal", True)
        and (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default") in _ROPES
        and model.device.type in DEVICES
    )


def _default_batch(model: Any) -> int:
    """On a GPU, what half of the free memory holds of one layer's activations; ours."""
    if model.device.type != "cuda":
        return _CPU_BATCH
    text = model.config.get_text_config()
    free, _ = torch.cuda.mem_get_info(model.device)
    numbers = 12 * text.hidden_size + 3 * text.intermediate_size  # alive at once for each token
    least, most = _BATCH_BOUNDS
    return max(least, min(most, int(free / 2 / (numbers * model.dtype.itemsize))))

"""How the embedded model is trained: a fixed number of steps on lessons, on the CPU, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recllm.mllm.tiny.architecture import Shape, fresh_model
from recllm.mllm.tiny.lessons import ATTRIBUTES, Lesson, PictureBook, Teacher
from recllm.mllm.tiny.tokenizer import build_processor
from recllm.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor


COMPARING = 0.3
"""What comparisons weigh beside the loss of the answers."""
_NOT_COMPARED = (-100,) * 9
_ASKED = 1200  # questions by which a leaning of the answers is found
_PICTURE_TOKENS = 4  # a toy-world picture has 56 x 56 pixels, a merged token 28 x 28


@dataclass(frozen=True)
class Course:
    """How the model is taught: first its vision tower to see, then the rest to speak of what it sees,
    and last to compare what it is asked about with what it was told."""

    looking: int = 350
    """Steps of the first part."""
    pictures: int = 64
    """Pictures of a step of the first part."""
    looking_rate: float = 1e-2
    """Muon's learning rate in the first part; rates fall to a hundredth along a cosine, in each part."""
    steps: int = 540
    """Steps of the second part."""
    lessons: int = 24
    """Lessons of a step of the second part."""
    speaking_rate: float = 5e-3
    """Muon's learning rate in the second part."""
    comparing: int = 260
    """Steps of the third part."""
    questions: int = 14
    """Questions of a step of the third part."""
    rehearsed: int = 10
    """Other lessons of a step of the third part, so that nothing is forgotten."""
    comparing_rate: float = 3e-3
    """Muon's learning rate in the third part."""
    other_rate: float = 2e-3
    """AdamW's, for embeddings, convolutions, biases and norms, in all parts."""
    warmup: int = 30
    """Steps of each part in which the rates rise."""
    weight_decay: float = 0.01
    """Of linear layers."""
    tokens: int = 2000
    """Most tokens of a batch, padding included; lessons of similar length go together."""
    drawn: int = 60
    """Pictures of each look that are drawn before the first step."""


def train(
    seed: int, shape: Shape, course: Course, *, progress: bool = True
) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor, list[float]]:
    """Trains the embedded model from nothing, on the CPU.

    Three parts: seeing takes many pictures, and a picture costs an eighth without a chat around it;
    comparing builds on speaking of what is seen. Ours.

    Returns:
        The model in evaluation mode, its processor, and the loss of each step of the second part (nats per
        token of the answers).
    """
    import torch

    processor = build_processor(shape.min_pixels, shape.max_pixels)
    teaching, drawing = (np.random.default_rng([seed, number, 0x7EAC4]) for number in range(2))
    total = course.looking + course.steps + course.comparing
    with (
        torch.random.fork_rng(devices=[]),
        Progress(None, "training", total, unit="step", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        book = PictureBook(drawing, course.drawn)
        model = fresh_model(shape, processor).train()
        _learn_to_see(model.model.visual, processor, book, course, bar)
        model.model.visual.requires_grad_(False)
        teacher = Teacher(teaching)
        optimizer = _Optimizer(model, course.steps, course.speaking_rate, course)
        losses = []
        for _ in range(course.steps):
            lessons = list(teacher.lessons(course.lessons))
            losses.append(_learn(model, None, batches_of(lessons, processor, book, course.tokens)))
            optimizer.step()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
        _learn_to_compare(model, processor, book, teacher, course, bar)
    return model.requires_grad_(True).eval(), processor, losses


def _learn_to_see(
    tower: torch.nn.Module, processor: Qwen2VLProcessor, book: PictureBook, course: Course, bar: Progress
) -> None:
    """Trains the tower so that color, pattern and shape can be read off the mean of a picture's tokens."""
    import torch

    sizes = [len(values) for values in ATTRIBUTES]
    readout = torch.nn.Linear(tower.config.hidden_size, sum(sizes))  # thrown away
    optimizer = _Optimizer(torch.nn.ModuleList([tower, readout]), course.looking, course.looking_rate, course)
    for _ in range(course.looking):
        looks = book.looks(course.pictures)
        batch = processor.image_processor([book.show(look) for look in looks], return_tensors="pt")
        tokens = tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        logits = readout(tokens.view(len(looks), _PICTURE_TOKENS, -1).mean(1)).split(sizes, dim=1)
        right = [
            [values.index(seen) for seen, values in zip(look, ATTRIBUTES, strict=True)] for look in looks
        ]
        losses = map(torch.nn.functional.cross_entropy, logits, torch.tensor(right).unbind(1))
        sum(losses).backward()
        optimizer.step()
        bar.update()


def _learn_to_compare(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    book: PictureBook,
    teacher: Teacher,
    course: Course,
    bar: Progress,
) -> None:
    """Trains on questions, whose yes and no are random, to know what a target shares with what was told.

    See `Comparison`. Whatever the answer has come to prefer by chance is taken out at the end.
    """
    import torch

    comparison = Comparison(model.config.text_config.hidden_size)
    learning = torch.nn.ModuleList([model, comparison.readout])
    optimizer = _Optimizer(learning, course.comparing, course.comparing_rate, course)
    for _ in range(course.comparing):
        questions = list(teacher.lessons(course.questions, Teacher.comparison))
        lessons = questions + list(teacher.lessons(course.rehearsed))
        _learn(model, comparison, batches_of(lessons, processor, book, course.tokens))
        optimizer.step()
        bar.update()
    if course.comparing:
        questions = list(teacher.lessons(_ASKED, Teacher.comparison))
        _prefer_nothing(model, processor, batches_of(questions, processor, book, course.tokens))


def _prefer_nothing(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    batches: list[dict[str, torch.Tensor]],
) -> None:
    """Makes the margin of yes over no uncorrelated with what a target shares: answers learned at random
    still lean one way a little, and the same way for everybody."""
    import torch

    states, shared = [], []
    with torch.no_grad():
        for batch in batches:
            targets, compared = batch.pop("targets"), batch.pop("compared")
            hidden = model.model(**batch, use_cache=False).last_hidden_state
            states.append(hidden[_answered_at(targets)])
            shared.append((compared < torch.tensor([len(each) for each in ATTRIBUTES] * 3)).float())
        state, same = torch.cat(states), torch.cat(shared)
        leaning = torch.linalg.qr((same - same.mean(0)).T.matmul(state).T).Q  # [width, 9], orthonormal
        yes, no = (processor.tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))
        rows = model.get_output_embeddings().weight
        excess = leaning @ (leaning.T @ (rows[yes] - rows[no]))
        rows[yes] -= excess / 2
        rows[no] += excess / 2


class _Optimizer:
    """Muon for matrices, with which copying is learned in two thirds of AdamW's steps; AdamW for the rest."""

    def __init__(self, model: torch.nn.Module, steps: int, rate: float, course: Course) -> None:
        import torch

        from recllm.mllm.tiny.muon import Muon

        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
        matrices = [weight for weight in self._trained if weight.ndim == 2 and id(weight) not in tables]
        others = [weight for weight in self._trained if weight.ndim != 2 or id(weight) in tables]
        muon = Muon(matrices, weight_decay=course.weight_decay)
        adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
        self._parts = ((muon, rate), (adam, course.other_rate))
        self._steps, self._warmup, self._done = steps, course.warmup, 0

    def step(self) -> None:
        """Applies the gradients and forgets them."""
        from torch.nn.utils import clip_grad_norm_

        clip_grad_norm_(self._trained, 1.0)
        for optimizer, rate in self._parts:
            optimizer.param_groups[0]["lr"] = rate * self._share_of_rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._done += 1

    def _share_of_rate(self) -> float:
        if self._done < self._warmup:
            return (self._done + 1) / self._warmup
        gone = (self._done - self._warmup) / (self._steps - self._warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * gone))


def batches_of(
    lessons: Sequence[Lesson], processor: Qwen2VLProcessor, book: PictureBook, tokens: int
) -> list[dict[str, torch.Tensor]]:
    """Renders lessons and puts those of similar length together.

    Args:
        lessons: The lessons of a step.
        processor: Renders chats and pictures exactly as for inference.
        book: Shows a picture for each look.
        tokens: Most tokens of a batch, padding included; a longer lesson has one for itself.

    Returns:
        Arguments of the model, padded on the right, and `targets` [rows, tokens]: the token to be said after
        each position where the assistant speaks, -100 elsewhere; and `compared` [rows, 9]: what the
        question's target shares with what is known of the user, -100 where nothing is asked.
    """
    import torch

    texts = processor.apply_chat_template([list(lesson.messages) for lesson in lessons], tokenize=False)
    token = processor.image_token
    texts = [text.replace(token, token * _PICTURE_TOKENS) for text in texts]
    rows = processor.tokenizer(texts)["input_ids"]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    groups: list[list[int]] = [[]]
    for number in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(rows[number]) > tokens:
            groups.append([])
        groups[-1].append(number)
    pad, image = processor.tokenizer.pad_token_id, processor.image_token_id
    batches = []
    for group in groups:
        ids = torch.full((len(group), len(rows[group[-1]])), pad)
        for position, number in enumerate(group):
            ids[position, : len(rows[number])] = torch.tensor(rows[number])
        batch = {"input_ids": ids, "targets": _targets(ids, processor)}
        batch["compared"] = torch.tensor([lessons[number].compared or _NOT_COMPARED for number in group])
        pictures = [book.show(look) for number in group for look in lessons[number].looks]
        if pictures:
            batch.update(processor.image_processor(pictures, return_tensors="pt"))
            batch["mm_token_type_ids"] = (ids == image).long()
        batches.append(batch)
    return batches


def _targets(ids: torch.Tensor, processor: Qwen2VLProcessor) -> torch.Tensor:
    import torch

    header = torch.tensor(processor.tokenizer("<|im_start|>assistant\n")["input_ids"])
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, len(header) - 1 :] = (ids.unfold(1, len(header), 1) == header).all(-1)
    turn = (ids == end).cumsum(1)  # <|im_end|> itself belongs to the next turn: nothing is said after it
    speaking = turn == torch.where(begins, turn, -1).cummax(1).values
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    return torch.where(speaking, following, -100)


class Comparison:
    """Has the model compare a question's target with what it knows of the user, before it says yes or no.

    A real model comes with that skill; what users like, neither knows: the answers in these lessons are
    random. What is shared is read off the state that the answer comes from, by a readout that is thrown away.
    Taught so, in the words that the state already has for what it sees, comparing takes some 2,000 lessons;
    from yes and no alone, many times as many. Ours.
    """

    def __init__(self, hidden: int) -> None:
        import torch

        self._sizes = [len(values) + 1 for values in ATTRIBUTES] * 3
        self.readout = torch.nn.Linear(hidden, sum(self._sizes))

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor, compared: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the cross-entropies of all questions of a batch, over all that is compared.

        Args:
            hidden: Last hidden states [rows, tokens, width].
            targets: What is said after each position [rows, tokens], -100 where nothing is.
            compared: See `batches_of`.
        """
        import torch

        asked = compared[:, 0] >= 0
        state = hidden[asked][_answered_at(targets[asked])]
        parts = self.readout(state).split(self._sizes, dim=1)
        each = zip(parts, compared[asked].unbind(1), strict=True)
        return sum(
            torch.nn.functional.cross_entropy(logits, right, reduction="sum") for logits, right in each
        )


def _answered_at(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the indices, into [rows, tokens], of the state that the last answer of each row comes from."""
    import torch

    spoken = targets >= 0
    starts = spoken & ~torch.nn.functional.pad(spoken, (1, -1))
    return torch.arange(len(targets)), spoken.shape[1] - 1 - starts.flip(1).int().argmax(1)


def _learn(
    model: Qwen2VLForConditionalGeneration,
    comparison: Comparison | None,
    batches: list[dict[str, torch.Tensor]],
) -> float:
    """Adds up the gradients of a step's mean loss over all answer tokens, and of its comparisons; returns the
    former."""
    import torch

    answered = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
    asked = max(1, sum(int((batch["compared"][:, 0] >= 0).sum()) for batch in batches))
    total = 0.0
    for batch in batches:
        targets, compared = batch.pop("targets"), batch.pop("compared")
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        spoken = targets >= 0
        logits = model.lm_head(hidden[spoken])
        loss = torch.nn.functional.cross_entropy(logits, targets[spoken], reduction="sum") / answered
        total += float(loss.detach())
        if comparison is not None and (compared >= 0).any():
            loss = loss + COMPARING * comparison.loss(hidden, targets, compared) / asked
        loss.backward()
    return total

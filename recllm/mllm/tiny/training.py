"""How the embedded model is trained: a fixed number of steps on lessons, on the CPU, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from recllm.data.toyworld.images import COLORS, PATTERNS, SHAPES
from recllm.mllm.tiny.architecture import Shape, fresh_model
from recllm.mllm.tiny.lessons import Lesson, PictureBook, Teacher
from recllm.mllm.tiny.tokenizer import build_processor

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor


_PICTURE_TOKENS = 4  # a toy-world picture has 56 x 56 pixels, a merged token 28 x 28


@dataclass(frozen=True)
class Course:
    """How the model is taught: first its vision tower to see, then the rest to speak of what it sees."""

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
    other_rate: float = 2e-3
    """AdamW's, for embeddings, convolutions, biases and norms, in both."""
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

    Two parts, because seeing takes many pictures, and a picture costs an eighth without a chat around it.
    Ours.

    Returns:
        The model in evaluation mode, its processor, and the loss of each step of the second part (nats per
        token of the answers).
    """
    import torch

    processor = build_processor(shape.min_pixels, shape.max_pixels)
    teaching, drawing = (np.random.default_rng([seed, number, 0x7EAC4]) for number in range(2))
    total, silent = course.looking + course.steps, None if progress else True
    with torch.random.fork_rng(devices=[]), tqdm(None, "training", total, unit="step", disable=silent) as bar:
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
            losses.append(_learn(model, batches_of(lessons, processor, book, course.tokens)))
            optimizer.step()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
    return model.requires_grad_(True).eval(), processor, losses


def _learn_to_see(
    tower: torch.nn.Module, processor: Qwen2VLProcessor, book: PictureBook, course: Course, bar: tqdm
) -> None:
    """Trains the tower so that color, pattern and shape can be read off the mean of a picture's tokens."""
    import torch

    vocabularies = (COLORS, PATTERNS, SHAPES)
    sizes = [len(vocabulary) for vocabulary in vocabularies]
    readout = torch.nn.Linear(tower.config.hidden_size, sum(sizes))  # thrown away
    optimizer = _Optimizer(torch.nn.ModuleList([tower, readout]), course.looking, course.looking_rate, course)
    for _ in range(course.looking):
        looks = book.looks(course.pictures)
        batch = processor.image_processor([book.show(look) for look in looks], return_tensors="pt")
        tokens = tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
        logits = readout(tokens.view(len(looks), _PICTURE_TOKENS, -1).mean(1)).split(sizes, dim=1)
        right = [
            [words.index(seen) for seen, words in zip(look, vocabularies, strict=True)] for look in looks
        ]
        losses = map(torch.nn.functional.cross_entropy, logits, torch.tensor(right).unbind(1))
        sum(losses).backward()
        optimizer.step()
        bar.update()


class _Optimizer:
    """Muon for matrices, with which copying is learned in two thirds of AdamW's steps; AdamW for the rest."""

    def __init__(self, model: torch.nn.Module, steps: int, rate: float, course: Course) -> None:
        import torch

        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        tables = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
        matrices = [weight for weight in self._trained if weight.ndim == 2 and id(weight) not in tables]
        others = [weight for weight in self._trained if weight.ndim != 2 or id(weight) in tables]
        muon = torch.optim.Muon(matrices, weight_decay=course.weight_decay, adjust_lr_fn="match_rms_adamw")
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
        each position where the assistant speaks, -100 elsewhere.
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


def _learn(model: Qwen2VLForConditionalGeneration, batches: list[dict[str, torch.Tensor]]) -> float:
    """Adds up the gradients of a step's mean loss over all answer tokens; returns that loss."""
    import torch

    answered = sum(int((batch["targets"] >= 0).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        targets = batch.pop("targets")
        hidden = model.model(**batch, use_cache=False).last_hidden_state
        spoken = targets >= 0
        logits = model.lm_head(hidden[spoken])
        loss = torch.nn.functional.cross_entropy(logits, targets[spoken], reduction="sum") / answered
        loss.backward()
        total += float(loss.detach())
    return total

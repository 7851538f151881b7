"""The transformers backend: length-sorted batches in this process, images decoded one batch ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from recllm.errors import DataError
from recllm.mllm.chat import Decoding, Request, Result
from recllm.mllm.generation.sampling import sampling_processors
from recllm.mllm.rendering import count_tokens, encode_expanded, encode_texts, expand, render, to_model
from recllm.mllm.vision.images import ImageError

if TYPE_CHECKING:
    from pathlib import Path

    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore


@dataclass(frozen=True, slots=True)
class _Prompt:
    key: bytes
    request: Request
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Prompts with their images (with a visual store, their keys in it), and results of unreadable images."""

    prompts: list[_Prompt]
    images: list[list[Any]]
    inputs: Any
    failed: list[Result]


class InProcessBackend:
    """Answers requests with a model in this process; see `recllm.mllm.chat.Backend`.

    Of the model's generation_config.json only the tokens that end an answer and pad a batch are used: what it
    says about sampling (Qwen2-VL ships a temperature and a repetition penalty) does not change what is
    decoded, so a `Decoding` says all.

    Attributes:
        identity: See `recllm.mllm.loading.LoadedModel`; a visual store adds the number type of its tokens.
        special_tokens: What `safe_text` should know of.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_tokens: int = 16384,
        batch_size: int = 32,
        workers: int = 2,
        visual_store: VisualStore | None = None,
    ):
        """Makes a backend of a loaded model, which it switches to inference.

        Args:
            loaded: The model.
            batch_tokens: The most tokens in a batch: rows, times the longest prompt and the longest answer.
                Where the accelerator has too little memory for it, it is lowered on the way.
            batch_size: The most requests in a batch.
            workers: Threads that decode images.
            visual_store: Read the images' tokens from it and run no vision tower; it must have them all.
        """
        for name, value in (
            ("batch_tokens", batch_tokens),
            ("batch_size", batch_size),
            ("workers", workers),
        ):
            if value < 1:
                raise DataError(f"{name} {value}: expected 1 or more")
        loaded.model.eval()
        self.identity = dict(loaded.identity)
        if visual_store is not None:
            self.identity["visual_store"] = visual_store.manifest["dtype"]
        self.special_tokens = loaded.special_tokens
        self._loaded = loaded
        self._batch_tokens = batch_tokens
        self._batch_size = batch_size
        self._workers = workers
        self._store = visual_store
        # Padding changes a fast tokenizer's state, which no other thread may be using meanwhile.
        self._tokenizer_lock = Lock()

    def count_tokens(self, request: Request) -> int:
        """Returns a prompt's exact length in tokens; of images only the headers are read.

        Raises:
            DataError: See `recllm.mllm.rendering.render`; ImageError where an image's header cannot be read.
        """
        return self._prompt(b"", request).tokens

    def show(self, request: Request) -> str:
        """Returns a prompt as the chat template writes it, one placeholder an image."""
        return render(self._loaded, request)

    def generate(
        self, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> Iterator[list[Result]]:
        """Answers (key, request) pairs, the longest prompts first, so that too little memory shows at once.

        Yields:
            The results of a batch, as it is done. An unreadable image or a prompt longer than the model's
            context is a result with an error; the other requests go on.

        Raises:
            DataError: A text forges special tokens (see `recllm.mllm.rendering.render`), the memory is too
                small for a single request, or the visual store lacks an image that can be read.
        """
        prompts, failed = self._prompts(requests, decoding)
        if failed:
            yield failed
        waiting = deque(sorted(prompts, key=lambda prompt: (-prompt.tokens, prompt.key)))
        decoders = ThreadPoolExecutor(self._workers, thread_name_prefix="images")
        ahead = ThreadPoolExecutor(1, thread_name_prefix="batch")
        try:
            upcoming = self._submit_next(ahead, decoders, waiting, decoding)
            while upcoming is not None:
                batch = upcoming.result()
                upcoming = self._submit_next(ahead, decoders, waiting, decoding)
                yield batch.failed + (self._answer(batch, decoding) if batch.prompts else [])
        finally:
            ahead.shutdown(cancel_futures=True)
            decoders.shutdown(cancel_futures=True)

    def _prompts(
        self, requests: Sequence[tuple[bytes, Request]], decoding: Decoding
    ) -> tuple[list[_Prompt], list[Result]]:
        prompts, failed = [], []
        limit = self._loaded.max_positions
        for key, request in requests:
            try:
                prompt = self._prompt(key, request)
            except ImageError as error:
                failed.append(Result.failed(key, f"image: {error}"))
                continue
            if prompt.tokens + decoding.max_new_tokens > limit:
                failed.append(
                    Result.failed(
                        key,
                        f"budget: request {request.id!r} has {prompt.tokens} tokens, and "
                        f"{decoding.max_new_tokens} for its answer, but the model takes {limit}",
                    )
                )
            else:
                prompts.append(prompt)
        return prompts, failed

    def _prompt(self, key: bytes, request: Request) -> _Prompt:
        from recllm.mllm.vision.token_budget import image_size

        sizes = [image_size(path) for path in request.images]
        with self._tokenizer_lock:
            text = render(self._loaded, request)
            expanded = expand(self._loaded, text, sizes)
            tokens = count_tokens(self._loaded, expanded)
        return _Prompt(key, request, text if self._store is None else expanded, tokens)

    def _submit_next(
        self,
        ahead: ThreadPoolExecutor,
        decoders: ThreadPoolExecutor,
        waiting: deque[_Prompt],
        decoding: Decoding,
    ) -> Future[_Batch] | None:
        if not waiting:
            return None
        row = waiting[0].tokens + decoding.max_new_tokens
        count = max(1, min(self._batch_size, self._batch_tokens // row, len(waiting)))
        prompts = [waiting.popleft() for _ in range(count)]
        return ahead.submit(self._prepare, prompts, decoders)

    def _prepare(self, prompts: list[_Prompt], decoders: ThreadPoolExecutor) -> _Batch:
        read = self._loaded.images.load if self._store is None else self._stored_key
        decoded = [[decoders.submit(read, path) for path in prompt.request.images] for prompt in prompts]
        good, images, failed = [], [], []
        for prompt, futures in zip(prompts, decoded, strict=True):
            try:
                shown = [future.result() for future in futures]
            except ImageError as error:
                failed.append(Result.failed(prompt.key, f"image: {error}"))
                continue
            good.append(prompt)
            images.append(shown)
        return self._encoded(good, images, failed)

    def _stored_key(self, path: Path) -> str:
        if (reason := self._store.manifest["unusable"].get(str(path))) is not None:
            raise ImageError(path, "unreadable", reason)
        return self._store.keys_of([path])[0]

    def _encoded(self, prompts: list[_Prompt], images: list[list[Any]], failed: list[Result]) -> _Batch:
        inputs = None
        if prompts:
            texts = [prompt.text for prompt in prompts]
            with self._tokenizer_lock:
                if self._store is None:
                    inputs = encode_texts(self._loaded, texts, images)
                else:
                    inputs = encode_expanded(self._loaded, texts)
        return _Batch(prompts, images, inputs, failed)

    def _answer(self, batch: _Batch, decoding: Decoding) -> list[Result]:
        try:
            return self._run(batch, decoding)
        except torch.OutOfMemoryError:
            rows = len(batch.prompts)
            if rows == 1:
                raise DataError(
                    f"request {batch.prompts[0].request.id!r}: its {batch.prompts[0].tokens} tokens need "
                    "more memory than the accelerator has; lower max_pixels, max_new_tokens or the number of "
                    "images"
                ) from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = (rows + 1) // 2
        self._batch_tokens = min(
            self._batch_tokens, half * (batch.prompts[0].tokens + decoding.max_new_tokens)
        )
        parts = (slice(0, half), slice(half, rows))
        halves = [self._encoded(batch.prompts[part], batch.images[part], []) for part in parts]
        return [result for part in halves for result in self._answer(part, decoding)]

    def _run(self, batch: _Batch, decoding: Decoding) -> list[Result]:
        loaded = self._loaded
        inputs = self._model_inputs(batch)
        keys = [prompt.key for prompt in batch.prompts]
        with torch.inference_mode(), _only_end_and_padding(loaded) as config:
            config.update(max_new_tokens=decoding.max_new_tokens, do_sample=False, use_cache=True)
            output = loaded.base_model.generate(
                **inputs,
                generation_config=config,
                logits_processor=sampling_processors(decoding, keys, inputs["input_ids"].device),
            )
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = inputs["attention_mask"].sum(-1).tolist()
        return [
            self._result(prompt.key, length, answer)
            for prompt, length, answer in zip(batch.prompts, lengths, answers, strict=True)
        ]

    def _model_inputs(self, batch: _Batch) -> dict[str, Any]:
        model, inputs = self._loaded.model, to_model(self._loaded, batch.inputs)
        if self._store is not None:
            keys = [key for shown in batch.images for key in shown]
            inputs |= self._store.mm_inputs(keys, model.device, model.dtype)
        return inputs

    def _result(self, key: bytes, prompt_tokens: int, answer: list[int]) -> Result:
        ends = self._loaded.stop_token_ids
        length = next((place for place, token in enumerate(answer) if token in ends), len(answer))
        with self._tokenizer_lock:
            text = self._loaded.tokenizer.decode(
                answer[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        stopped = length < len(answer)
        return Result(key, text, prompt_tokens, length + stopped, "stop" if stopped else "length")


@contextmanager
def _only_end_and_padding(loaded: LoadedModel) -> Iterator[GenerationConfig]:
    """Yields a config of end and padding alone; the model's own, which fills gaps, is the same meanwhile."""
    model = loaded.base_model
    before = model.generation_config
    ends = {"eos_token_id": list(loaded.stop_token_ids), "pad_token_id": loaded.tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    try:
        yield GenerationConfig(**ends)
    finally:
        model.generation_config = before

"""What a builder that asks a model works with: dataset, templates, backend and store."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from recllm.builders.catalog import Catalog
from recllm.builders.options import ModelOptions, check_least, check_plain
from recllm.builders.texts import check_free, describe_template
from recllm.builders.unused import check_used
from recllm.data.dataset import Dataset
from recllm.data.image_hashes import ImageHashes
from recllm.data.texts import text_path
from recllm.errors import DataError
from recllm.files import MANIFEST
from recllm.mllm.chat import Backend, Decoding, Request, Result
from recllm.mllm.generation.run import Generated, generate
from recllm.mllm.generation.texts import write_texts
from recllm.mllm.store import GenerationStore, request_key
from recllm.processes import rank
from recllm.prompts import TEMPLATES
from recllm.prompts.templates import Template, load_templates
from recllm.runs.provenance import describe_run

_SHOWN = 2  # prompts that a dry run prints
_ERRORS_SHOWN = 5
_LOOKED_AT = 5_000  # requests that an estimate looks up


class Session:
    """One run of a builder.

    The model is loaded, and the store opened, when they are first asked for: what can be refused without them
    is refused before.

    Attributes:
        options: What was asked for.
        dataset: The dataset.
        templates: The prompt templates by name, the user's in place of the defaults.
    """

    def __init__(self, options: ModelOptions) -> None:
        check_plain("--tag", options.tag)
        check_least(1, limit=options.limit, max_new_tokens=options.max_new_tokens)
        check_least(1, batch_size=options.batch_size, batch_tokens=options.batch_tokens)
        check_used(options)
        self.options = options
        self.dataset = Dataset.open(options.dataset)
        self.templates = load_templates(TEMPLATES, options.templates)

    @cached_property
    def backend(self) -> Backend:
        """What answers requests."""
        return make_backend(self.options)

    @cached_property
    def catalog(self) -> Catalog:
        """The items as prompts show them to this model."""
        return Catalog(self.dataset, self.backend.special_tokens)

    @property
    def store_folder(self) -> Path:
        """Where answers are kept."""
        return self.options.store or self.dataset.folder / "generations"

    @cached_property
    def store(self) -> GenerationStore:
        """The answers that there are."""
        return GenerationStore.open(self.store_folder)

    def decoding(self, max_new_tokens: int) -> Decoding:
        """Returns the decoding settings of a step whose answers are usually at most so many tokens long."""
        options = self.options
        length = max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
        return Decoding(length, options.temperature, options.top_p, options.seed)

    def text_path(self, name: str) -> Path:
        """Returns where the texts of a step go: DATASET/texts/<name>[-<tag>].parquet."""
        return text_path(self.dataset.folder, name, self.options.tag)

    def check_free(self, *names: str) -> None:
        """Raises a `DataError` where texts of these names exist and may not be replaced."""
        for name in names:
            check_free(self.text_path(name), overwrite=self.options.overwrite or self.options.dry_run)

    def answer(self, name: str, requests: Iterable[Request], decoding: Decoding) -> Generated:
        """Answers requests through the store; see `recllm.mllm.generation.run.generate`."""
        hashes = ImageHashes(self.dataset.folder)
        return generate(requests, self.backend, self.store, decoding, progress=name, image_hashes=hashes)

    def write(
        self,
        name: str,
        generated: Generated,
        decoding: Decoding,
        templates: Iterable[Template],
        facts: dict[str, Any],
        extra: dict[str, list[Any]] | None = None,
        path: Path | None = None,
    ) -> Path:
        """Writes texts/<name>.parquet on rank 0 and prints what came of it.

        Args:
            name: The name, without the tag.
            generated: The answers.
            decoding: How they were decoded.
            templates: The templates of the prompts.
            facts: Further facts for the file's metadata, such as the split that was read.
            extra: Further columns, a value for each answer.
            path: Where to, instead.
        """
        path = path or self.text_path(name)
        counts = generated.counts
        if counts.failed and counts.failed == counts.unique:
            item, reason = next(generated.errors())
            raise DataError(f"{name}: none of {counts.requests:,} requests was answered; {item}: {reason}")
        if rank() != 0:
            return path
        metadata = {
            "name": name,
            "data_hash": self.dataset.data_hash,
            "model": self.backend.identity,
            "decoding": decoding.as_dict(),
            "special_tokens": list(self.backend.special_tokens),
            "templates": {template.name: describe_template(template) for template in templates},
            "run": timeless_run(),
            **facts,
        }
        write_texts(path, generated, metadata=metadata, extra=extra)
        print(
            f"{path}: {counts.requests:,} requests, {counts.unique:,} different; "
            f"{counts.generated:,} answered now, {counts.stored:,} from the store, {counts.failed:,} failed"
        )
        cut = sum(result.finish == "length" for _, result in generated.results())
        if cut:
            print(f"  {cut:,} answers were cut off at {decoding.max_new_tokens} tokens (--max-new-tokens)")
        for request_id, reason in itertools.islice(
            generated.errors() if counts.failed else (), _ERRORS_SHOWN
        ):
            print(f"  no text for {request_id}: {reason}")
        if counts.failed > _ERRORS_SHOWN:
            print(f"  and {counts.failed - _ERRORS_SHOWN:,} more; the metadata of {path.name} lists them")
        if counts.failed:
            print("  the same command with --overwrite tries these again, and nothing else")
        return path

    def preview(
        self, name: str, requests: Iterator[Request], decoding: Decoding, total: int | None = None
    ) -> list[tuple[Request, Result]]:
        """The dry run of one step: prints the first prompts exactly, what the model answers, and an estimate.

        Args:
            name: The step.
            requests: Its requests, or the first of them.
            decoding: How answers are decoded.
            total: How many requests there are, where `requests` are only the first ones.

        Returns:
            The requests that were tried, with their answers; nothing is kept on disk.
        """
        tried = list(itertools.islice(requests, self.options.batch_size))
        if not tried:
            print(f"{name}: no requests")
            return []
        started = time.perf_counter()
        pairs = [(str(number).encode(), request) for number, request in enumerate(tried)]
        answers = {result.key: result for batch in self.backend.generate(pairs, decoding) for result in batch}
        seconds = time.perf_counter() - started
        results = [answers[key] for key, _ in pairs]
        for request, result in list(zip(tried, results, strict=True))[:_SHOWN]:
            print(f"--- {name}: {request.id} ({result.prompt_tokens:,} prompt tokens)")
            print(self.backend.show(request))
            print(f"--- answer ({result.completion_tokens:,} tokens, {result.finish})")
            print(result.error or result.text)
        self._estimate(name, results, itertools.chain(tried, requests), decoding, seconds, total)
        return list(zip(tried, results, strict=True))

    def _estimate(
        self,
        name: str,
        results: list[Result],
        requests: Iterable[Request],
        decoding: Decoding,
        seconds: float,
        total: int | None,
    ) -> None:
        """Prints what is to do, from the first requests: how many differ, how many are answered already."""
        looked_at = list(itertools.islice(requests, _LOOKED_AT))
        keys, hashes = set(), ImageHashes(self.dataset.folder)
        for request in looked_at:
            with contextlib.suppress(OSError):  # an unreadable image: the run names it
                keys.add(request_key(self.backend.identity, decoding, request, hashes))
        done = 0
        if (self.store_folder / MANIFEST).exists():
            done = sum(self.store.get(key) is not None for key in keys)
        count = len(looked_at) + sum(1 for _ in requests) if total is None else total
        waiting = count * (len(keys) - done) / len(looked_at)
        prompt, answer = (
            sum(getattr(result, field) for result in results) / len(results)
            for field in ("prompt_tokens", "completion_tokens")
        )
        share = "" if count == len(looked_at) else f" (judged by the first {len(looked_at):,})"
        print(
            f"{name}: {count:,} requests, about {waiting:,.0f} to do after repetitions and the store{share}; "
            f"{prompt:,.0f} prompt and {answer:,.0f} answer tokens each (mean of {len(results)})"
        )
        span = _span(waiting * seconds / len(results))
        print(f"{name}: about {span} at the rate of these {len(results)} requests")
        if self.options.price_in is not None and self.options.price_out is not None:
            cost = waiting * (prompt * self.options.price_in + answer * self.options.price_out) / 1e6
            print(f"{name}: about {cost:,.2f} at the given prices")


def timeless_run() -> dict[str, Any]:
    """Returns command and versions. Without the time, a command that is resumed writes the same bytes."""
    return {name: value for name, value in describe_run().items() if name != "time"}


def make_backend(options: ModelOptions) -> Backend:
    """Returns the backend that the options name; only its libraries are imported.

    Raises:
        DataError: The model cannot be loaded, or a library is not installed.
    """
    if options.backend == "server":
        from recllm.mllm.generation.server import ServerBackend, ServerOptions
        from recllm.mllm.loading import DEFAULT_MAX_PIXELS

        return ServerBackend(
            ServerOptions(
                base_url=options.base_url,
                model=options.model,
                revision=options.revision,
                api_key_env=options.api_key_env,
                concurrency=options.concurrency,
                max_pixels=DEFAULT_MAX_PIXELS if options.max_pixels is None else options.max_pixels,
            )
        )
    shared = {
        "adapter": options.adapter,
        "revision": options.revision,
        "dtype": options.dtype,
        "min_pixels": options.min_pixels,
        "max_pixels": options.max_pixels,
    }
    if options.backend == "vllm":
        from recllm.mllm.generation.vllm_offline import VllmBackend, VllmOptions

        parallel = options.tensor_parallel_size
        return VllmBackend(VllmOptions(model=options.model, tensor_parallel_size=parallel, **shared))
    from recllm.mllm.generation.in_process import InProcessBackend
    from recllm.mllm.loading import load

    loaded = load(
        options.model,
        device_map=options.device_map,
        attn_implementation=options.attn_implementation,
        quantization=None if options.quantization == "none" else options.quantization,
        **shared,
    )
    return InProcessBackend(loaded, batch_tokens=options.batch_tokens, batch_size=options.batch_size)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h"

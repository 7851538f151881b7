"""The command that scores a part of an instructions folder."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from recllm.config import refuse_given
from recllm.data.instructions import YES_NO, InstructionPart, check_trained_on, open_part, rows_of_task
from recllm.data.origins import made, made_metadata
from recllm.data.prompt_files import FILE_ROW, PromptFile, image_paths, small_columns
from recllm.errors import DataError
from recllm.files import MANIFEST, read_json
from recllm.mllm.loading import LoadOptions
from recllm.mllm.scoring.options import YesNoOptions

if TYPE_CHECKING:
    from recllm.mllm.loading import LoadedModel
    from recllm.mllm.vision.store import VisualStore

_STEP_BLOCK = 4096  # rows whose steps are generated at a time


def score_yes_no(options: YesNoOptions) -> None:
    """Scores a part of an instructions folder and writes scores/NAME.parquet.

    Under `accelerate launch` every rank scores its share, and rank 0 writes the file. A run that was killed
    goes on where it was when the same command is given again.

    Raises:
        DataError: An option or file is not as it must be; a sample cannot be scored.
    """
    _check(options)
    source = open_part(options.instructions, options.part)
    which, name = model_of(options)
    weights = trained_weights(options)
    same_split = all(
        [check_trained_on(each, source, allow_other_split=options.allow_other_split) for each in weights]
    )
    name = options.name or (name if options.part == "test" else f"{name}-{options.part}")
    out = options.out / "scores" / f"{name}.parquet"
    if out.exists() and not options.overwrite:
        raise DataError(f"{out} exists already; give another --name or --out, or --overwrite to replace it")
    rows = rows_to_score(source, options.limit)
    prompts = PromptFile(source.path)

    from recllm.mllm.scoring.job import score_into
    from recllm.mllm.scoring.scorer import YesNoScorer

    loaded = which.load()
    store = None
    if options.visual_store is not None:
        from recllm.mllm.vision.of_dataset import open_visual_store

        images = image_paths(rows)
        store = open_visual_store(options.visual_store, loaded, source.dataset, images, passes=1)
    scorer = YesNoScorer(
        loaded,
        visual_store=store,
        yes=options.yes,
        no=options.no,
        probability=options.probability,
        batch_tokens=options.batch_tokens,
    )
    job = {
        "instructions": source.description["sha256"],
        "limit": options.limit,
        "step_tokens": options.step_tokens if options.generate_steps else None,
    }
    metadata = {
        **{"recllm.protocol": source.protocol, "recllm.system": name},
        **({"recllm.candidates": source.candidates} if source.candidates else {}),
        **made_metadata(
            made(
                **source.facts(),
                top_k=source.top_k,
                weights=[str(each) for each in weights],
                trained_on_other_split=None if same_split else True,
            )
        ),
    }
    with contextlib.ExitStack() as stack:
        if options.generate_steps:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".steps-", dir=out.parent))
            path = Path(folder) / "prompts.parquet"
            _write_steps(path, prompts, rows, source.dataset, loaded, store, options.step_tokens)
            rows, prompts = rows.with_columns(pl.int_range(pl.len()).alias(FILE_ROW)), PromptFile(path)
        summary = score_into(
            scorer,
            rows,
            source.dataset,
            out,
            job=job,
            metadata=metadata,
            overwrite=options.overwrite,
            prompts=prompts,
        )
    if summary is not None:
        print(f"{out} ({scorer.method}): {summary}")


def rows_to_score(source: InstructionPart, limit: int | None) -> pl.DataFrame:
    """Returns the yes/no rows of a part, or those of its first `limit` users, without their prompts.

    They are as `recllm.data.prompt_files.small_columns` returns them; `PromptFile` reads their prompts.

    Raises:
        DataError: There are none, or a user's target has an item twice.
    """
    users = None
    if limit is not None:
        names = rows_of_task(pl.scan_parquet(source.path, glob=False)).select("user").collect()["user"]
        users = names.unique(maintain_order=True).head(limit)
    rows = small_columns(source.path, users, task=YES_NO)
    if rows.is_empty():
        raise DataError(f"{source.path} has no rows that ask for yes or no, so there is nothing to score")
    keys = ["user", "target", "item"]
    if (twice := rows.filter(rows.select(keys).is_duplicated())).height:
        first = dict(zip(keys, twice.select(keys).row(0), strict=True))
        raise DataError(
            f"{source.path}: {first} stands in it more than once, and a score file has one score for each; "
            "build the part with --candidates"
        )
    return rows


def model_of(options: YesNoOptions) -> tuple[LoadOptions, str]:
    """Returns what to load, and the system's name where none is given.

    Raises:
        DataError: Neither a model nor a run is named, or both are; or the run's folder is not one.
    """
    if (options.model is None) == (options.run is None):
        raise DataError("name what is to score: --model NAME (and --adapter), or --run FOLDER; one of them")
    given: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("dtype", "quantization", "min_pixels", "max_pixels", "revision")
        if getattr(options, name) is not None
    }
    placed = {"device_map": options.device_map, "attn_implementation": options.attn_implementation}
    if options.run is None:
        settings = {"model": options.model, "adapter": options.adapter, **given}
        name = str(options.model).rstrip("/").rpartition("/")[2]
    else:
        if options.adapter is not None:
            raise DataError("--run has an adapter of its own; leave --adapter out, or name --model instead")
        settings = {**_settings_of_run(options.run), **given}
        name = Path(options.run).resolve().name
    if settings.get("quantization") == "none":
        settings["quantization"] = None
    return LoadOptions(**settings, **placed), name


def trained_weights(options: YesNoOptions) -> list[Path | str]:
    """Returns what may have been trained on rows of a split: the run, or the model and its adapter."""
    return [each for each in (options.run, options.model, options.adapter) if each is not None]


def _settings_of_run(run: Path) -> dict[str, Any]:
    manifest = read_json(run / MANIFEST, "a run's folder (made by `recipes/sft.py`)")
    trained = manifest.get("settings")
    if not isinstance(trained, dict) or "model" not in trained:
        raise DataError(f"{run / 'manifest.json'} does not say which model was trained; name --model instead")
    names = ("quantization", "min_pixels", "max_pixels", "dtype", "revision")
    settings = {name: trained[name] for name in names if trained.get(name) is not None}
    if (run / "adapter_config.json").is_file():
        return {**settings, "model": trained["model"], "adapter": str(run)}
    for name in ("revision", "dtype"):  # of the base; the run's folder has weights of its own
        settings.pop(name, None)
    return {**settings, "model": str(run)}


def _check(options: YesNoOptions) -> None:
    for name in ("batch_tokens", "step_tokens", "limit", "min_pixels", "max_pixels"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DataError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    if not options.generate_steps:
        refuse_given(
            options, ("step_tokens",), "without --generate-steps, which it is for. Leave it out, or add that"
        )
    name = options.name
    if name is not None and (Path(name).name != name or name.startswith(".")):
        raise DataError(f"--name {name!r}: expected a plain word, which is part of a file's name")


def _write_steps(
    path: Path,
    prompts: PromptFile,
    rows: pl.DataFrame,
    dataset: Path,
    loaded: LoadedModel,
    store: VisualStore | None,
    tokens: int,
) -> None:
    """Writes the rows with steps in the model's own words, a block at a time; see `with_generated_steps`."""
    import pyarrow.parquet as pq

    from recllm.mllm.generation.in_process import InProcessBackend
    from recllm.mllm.scoring.steps import with_generated_steps
    from recllm.mllm.store import GenerationStore

    backend = InProcessBackend(loaded, visual_store=store)
    answers = GenerationStore.open(dataset / "generations")
    with contextlib.ExitStack() as stack:
        writer = None
        for block in rows.iter_slices(_STEP_BLOCK):
            built = prompts.take(block[FILE_ROW], ("id", "prompt", "images"))
            table = with_generated_steps(built, dataset, backend, answers, tokens).to_arrow()
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema, compression="zstd"))
            writer.write_table(table)

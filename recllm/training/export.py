"""`recllm export`: a run as one plain model folder, which scores stored prompts as the run did, or fails.

The adapter is merged into the base in the number type of the export, never into 4 bits, for rounding to 4
bits again would lose most of it. What is written is then loaded again, as a user would, and scores the run's
stored prompts. Four things are asked of it; the bounds were chosen by measuring on the embedded model. Ours.

1. Merged = base + adapter, in the same number type (`tolerance`, in log-odds): there, the largest difference
   was 0.000002 in float32 and 0.004 to 0.011 in bfloat16.
2. Merged differs from base + adapter by less than a quarter of what the adapter does to the base. A merge
   that leaves the weights as they were is off by all of it, however little that is (huggingface/peft#2586).
3. The run, loaded as it was trained (in 4 bits, if so), still scores as it did (`SAME`): base, adapter,
   images and stored prompts belong together. Kernels of another machine moved an NF4 score by 0.013.
4. The export scores as the run did. Of LoRA and full fine-tuning only the number type is another now. QLoRA
   trained on a base in 4 bits, and leaving out its rounding moves scores, most of all by one amount for all
   prompts, which changes no ranking: by 0.05 to 0.07, with a scatter of 0.002 to 0.08 around it. That amount
   may be 0.25, or what the adapter does, or what the margins vary by, whichever is most; the scatter may be
   as much as they vary, or 0.02.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from recllm.errors import DataError
from recllm.files import MANIFEST, read_json, sha256, staged_folder, write_json
from recllm.runs.folder import GRPO, SFT, read_manifest
from recllm.runs.provenance import describe_run

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

KIND = "exported model"
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
LOST_SHARE = 0.25
SAME = 0.1
ROUNDING = 0.02
NF4_SHIFT = 0.25
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")


@dataclass
class ExportOptions:
    """Writes a run as a model of its own: adapter merged in bfloat16, checked on the run's stored prompts."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """The run's folder, made by recipes/sft.py or recipes/grpo.py."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """The folder to make: a plain transformers model with its processor."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number type of the exported weights."""
    tolerance: float | None = None
    """Largest difference of a stored prompt's margin (log-odds) between the export and base + adapter in the
    same number type; by default 0.1 in bfloat16 and 0.001 in float32."""
    dataset: Path | None = None
    """The dataset folder that the stored prompts' images are in, where it was moved since the training."""
    overwrite: bool = False
    """Replace OUT where recllm made it."""
    push_to_hub: str | None = None
    """Upload the export to this repository of the hub (USER/NAME), which is made private."""


@dataclass(frozen=True)
class Comparison:
    """How two models score the same prompts.

    Attributes:
        largest: Largest absolute difference of a margin.
        mean: Mean absolute difference.
        scatter: Standard deviation of the difference: what is left of it where all prompts move alike.
        spread: Standard deviation of the second model's margins.
        rank_correlation: Spearman's, ties at their mean rank; 1 where one of the two does not vary.
    """

    largest: float
    mean: float
    scatter: float
    spread: float
    rank_correlation: float

    @classmethod
    def of(cls, margins: np.ndarray, reference: np.ndarray) -> Comparison:
        """Compares margins, each (prompts,), with those of a reference."""
        from scipy.stats import spearmanr

        difference = margins - reference
        varies = margins.std() > 0 and reference.std() > 0
        correlation = float(spearmanr(margins, reference).statistic) if varies else 1.0
        return cls(
            largest=float(abs(difference).max()),
            mean=float(abs(difference).mean()),
            scatter=float(difference.std()),
            spread=float(reference.std()),
            rank_correlation=correlation,
        )

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.2g}, mean {self.mean:.2g}, scatter {self.scatter:.2g}, where "
            f"margins vary by {self.spread:.2g}; rank correlation {self.rank_correlation:.3f}"
        )


def export(options: ExportOptions) -> None:
    """Writes a run as a model folder of its own; where a check fails, nothing is left at `out`.

    Raises:
        DataError: The run is not complete, its base or its images are gone, or the export does not score the
            stored prompts as the run does.
    """
    if options.tolerance is not None and not 0 <= options.tolerance < float("inf"):
        raise DataError(f"--tolerance {options.tolerance}: expected 0 or more")
    manifest = read_run(options.run)
    probes = _read_probes(options.run)
    dataset = options.dataset or Path(_made_from(manifest)["dataset"])
    if not dataset.is_dir():
        raise DataError(
            f"{dataset}: the stored prompts' images were there, and it is gone; say --dataset FOLDER"
        )
    settings = manifest["settings"]
    with staged_folder(options.out, kind=KIND, overwrite=options.overwrite) as staging:
        stored = probes["margin"].to_numpy()
        own = _margins(_as_trained(options.run, settings), probes, dataset)
        before, base = _write(options, settings, probes, dataset, own, staging)
        after = _margins(_loaded(settings, str(staging), None, _computed_in(options)), probes, dataset)
        checks = {
            "stored": Comparison.of(own, stored),
            "merge": Comparison.of(after, before),
            "run": Comparison.of(after, stored),
        }
        if base is not None:
            checks["adapter"] = Comparison.of(before, base)
        for what, comparison in _said(settings).items():
            if what in checks:
                print(f"{comparison}: {checks[what]}")
        _check(options, settings["method"], checks)
        write_json(staging / MANIFEST, _manifest(options, manifest, checks))
    print(f"{options.out}: a model in {options.dtype}, for `load({str(options.out)!r})` or transformers")
    if options.push_to_hub is not None:
        from recllm.training.hub import push_folder

        print(push_folder(options.out, options.push_to_hub))


def read_run(run: Path) -> dict[str, Any]:
    """Returns the manifest of a finished run.

    Raises:
        DataError: The folder is not a run's, or its training has not ended.
    """
    kind = read_json(run / MANIFEST, "a run's folder").get("kind")
    manifest = read_manifest(run, GRPO if kind == GRPO else SFT)
    if "parts" not in manifest or not any((run / name).is_file() for name in _WEIGHTS):
        raise DataError(f"{run}: its training has not ended; run the same command again to resume it")
    return manifest


def _made_from(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a run says about its rows (fine-tuning) or its items (GRPO), the dataset's place among it."""
    return manifest["data"] if manifest["kind"] == GRPO else manifest["instructions"]


def _read_probes(run: Path) -> pl.DataFrame:
    import polars as pl

    path = run / "probes.parquet"
    if not path.is_file():
        raise DataError(f"{path} is missing: without stored prompts an export cannot be checked; train again")
    probes = pl.read_parquet(path, glob=False)
    if probes.is_empty() or not probes["margin"].is_finite().all():
        raise DataError(f"{path}: no prompts, or margins that are no numbers; did the training diverge?")
    return probes


def _write(
    options: ExportOptions,
    settings: Mapping[str, Any],
    probes: pl.DataFrame,
    dataset: Path,
    own: np.ndarray,
    folder: Path,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Writes the merged model; returns the margins before the merge, and those of the base alone."""
    import torch

    base = None
    if settings["method"] == "full":
        loaded = _loaded(settings, str(options.run), None, _computed_in(options))
        before = own
        model = loaded.model
    else:
        loaded = _loaded(settings, settings["model"], options.run, _computed_in(options))
        before = _margins(loaded, probes, dataset)
        with loaded.model.disable_adapter():
            base = _margins(loaded, probes, dataset)
        model = merged(loaded.model, options.run)
    model.to(getattr(torch, options.dtype)).save_pretrained(folder)
    loaded.processor.save_pretrained(folder)
    return before, base


def _computed_in(options: ExportOptions) -> str:
    """The number type to merge and score in: that of the export, if this machine computes in it."""
    import torch

    from recllm.precision import computed_in

    on_cpu = not torch.accelerator.is_available()
    return str(computed_in(getattr(torch, options.dtype), on_cpu=on_cpu)).removeprefix("torch.")


def merged(model: Any, run: Path) -> Any:
    """Returns a model with its adapter merged into the weights.

    Raises:
        DataError: A merged weight is no number.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise DataError(f"{run}: the adapter cannot be merged: {error}") from None


def _as_trained(run: Path, settings: Mapping[str, Any]) -> Any:
    if settings["method"] == "full":
        return _loaded(settings, str(run), None, "auto")
    return _loaded(settings, settings["model"], run, settings["dtype"], settings["quantization"])


def _loaded(
    settings: Mapping[str, Any],
    name: str,
    adapter: Path | None,
    dtype: str,
    quantization: str | None = None,
) -> Any:
    from recllm.mllm import load

    return load(
        name,
        adapter=adapter,
        dtype=dtype,
        quantization=quantization,
        revision=settings["revision"] if adapter is not None else None,
        attn_implementation=settings["attn_implementation"],
        min_pixels=settings["min_pixels"],
        max_pixels=settings["max_pixels"],
    )


def _margins(loaded: Any, probes: pl.DataFrame, dataset: Path) -> np.ndarray:
    import numpy as np

    from recllm.mllm.scoring import YesNoScorer, score_table

    table = score_table(YesNoScorer(loaded), probes.drop("margin"), dataset)
    return table["margin"].to_numpy().astype(np.float64)


def _said(settings: Mapping[str, Any]) -> dict[str, str]:
    full = settings["method"] == "full"
    return {
        "stored": "the run as it was trained against its stored margins",
        "adapter": "adapter against base alone",
        "merge": "exported against the run's weights" if full else "exported against base + adapter",
        "run": "exported against the run's own margins",
    }


def _check(options: ExportOptions, method: str, checks: Mapping[str, Comparison]) -> None:
    """Raises a `DataError` where one of the bounds is passed."""
    import math

    merge, run = checks["merge"], checks["run"]
    numbers = [value for each in checks.values() for value in (each.largest, each.mean)]
    if not all(map(math.isfinite, numbers)):
        raise DataError(f"{options.run}: the exported model's margins are no numbers; try --dtype float32")
    if checks["stored"].largest > SAME:
        raise DataError(
            f"{options.run}: the run itself no longer scores its stored prompts as it did "
            f"({checks['stored']}); base, adapter, images and stored prompts do not belong together"
        )
    bound = TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    if "adapter" in checks and merge.mean > LOST_SHARE * checks["adapter"].mean:
        raise DataError(
            f"{options.run}: the merge lost the adapter: margins are off by {merge.mean:.2g} on average, and "
            f"all that the adapter does to them is {checks['adapter'].mean:.2g}. Try --dtype float32; if it "
            "stays, the merged layers are not those that were trained"
        )
    if merge.largest > bound:
        raise DataError(
            f"{options.run}: the exported model scores a stored prompt by {merge.largest:.2g} differently "
            f"from the weights that it was made of, more than {bound:.2g}; try --dtype float32, or allow it "
            "by --tolerance"
        )
    if method == "qlora":
        moved = run.mean > max(NF4_SHIFT, run.spread, checks["adapter"].mean)
        wrong = moved or run.scatter > max(run.spread, ROUNDING)
    else:
        wrong = run.largest > bound + TOLERANCES["bfloat16"]
    if wrong:
        raise DataError(
            f"{options.run}: the exported model does not score the stored prompts as the run did ({run}); "
            "try --dtype float32"
        )


def _manifest(
    options: ExportOptions, manifest: Mapping[str, Any], checks: Mapping[str, Comparison]
) -> dict[str, Any]:
    weights = next(options.run / name for name in _WEIGHTS if (options.run / name).is_file())
    return {
        "kind": KIND,
        "dtype": options.dtype,
        "from": {"run": str(options.run), "sha256": sha256(weights), "model": manifest["model"]},
        "settings": manifest["settings"],
        "data" if manifest["kind"] == GRPO else "instructions": _made_from(manifest),
        "checks": {name: vars(comparison) for name, comparison in checks.items()},
        "run": describe_run(),
    }

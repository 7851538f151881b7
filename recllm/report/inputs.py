"""Everything that a report is made from, read and checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recllm.data.candidate_files import Candidates
from recllm.data.dataset import Dataset
from recllm.data.instructions import open_part
from recllm.data.origins import Origin, check_same_origin
from recllm.data.splits import Split
from recllm.data.tables import describe, read_table, text_ids
from recllm.errors import DataError
from recllm.evaluation.inputs import System, read_system, read_systems
from recllm.evaluation.ranks import check_one_setting
from recllm.evaluation.significance import check_same_records
from recllm.files import MANIFEST, read_json
from recllm.report.options import ReportOptions
from recllm.runs.reading import Run, read_run


@dataclass(frozen=True, eq=False)
class Scored:
    """What one system said of each row of the candidate file, in the order of that file; shape [rows]."""

    name: str
    path: Path
    score: np.ndarray
    label: np.ndarray
    probability: np.ndarray | None
    """None where the score file has none."""
    outside: np.ndarray | None
    """Probability mass on answers that are neither yes nor no; None where the score file has none."""


@dataclass(eq=False)
class Inputs:
    """The inputs of a report; optional ones are None where they were not given."""

    systems: list[System]
    """At least one; the first is what the report is about."""
    scored: list[Scored]
    """Those of `systems` that came with scores."""
    ablation: list[System]
    """Named by what their models were shown."""
    runs: list[Run]
    candidates: Candidates | None
    dataset: Dataset | None
    split: Split | None
    instructions: Path | None
    """The parquet file with the prompts of the part."""
    instructions_manifest: dict[str, Any] = field(default_factory=dict)
    candidates_manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        return self.systems[0].records.protocol

    @property
    def score_files(self) -> list[Path]:
        return [system.path for system in self.systems]

    def with_candidates(self, files: Sequence[Path]) -> list[Path]:
        """Returns files, and the candidate file that they were ranked by."""
        return [*files, *([self.candidates.path] if self.candidates else [])]


def read_inputs(options: ReportOptions) -> Inputs:
    """Reads what the options name.

    Raises:
        DataError: A file is missing, damaged or of another kind; files do not belong to one protocol, one set
            of candidates, one dataset; or the options contradict each other.
    """
    _check_options(options)
    candidates = Candidates.read(options.candidates) if options.candidates else None
    folders = [path for path in options.files if path.is_dir()]
    tables = tuple(path for path in options.files if not path.is_dir())
    if not tables:
        raise DataError("no score file or rank records were given; a report needs at least one")
    systems = read_systems(tables, candidates)
    ablation = _read_ablation(options.ablation, candidates)
    everyone = [*systems, *ablation]
    check_one_setting([(str(system.path), system.records) for system in everyone])
    for other in everyone[1:]:
        check_same_records(systems[0].records, other.records)
    _check_part(systems[0].records.protocol, options.part)
    dataset = Dataset.open(options.dataset) if options.dataset else None
    split = _find_split(dataset, candidates, systems[0].records.protocol) if dataset else None
    if dataset is not None:
        _check_users(dataset, systems[0])
    instructions, manifest = _read_instructions(options, dataset, split)
    runs = [read_run(folder) for folder in folders]
    for one in _origins(everyone, candidates, runs):
        for other in (split.origin if split else None, systems[0].records.origin):
            if other is not None:
                check_same_origin(one, other, remedy="a report is about one split; leave it out")
    return Inputs(
        systems=systems,
        scored=[
            _read_scored(system, system.candidates)
            for system in systems
            if system.candidates and system.pooled_auc is not None
        ],
        ablation=ablation,
        runs=runs,
        candidates=next((each.candidates for each in systems if each.candidates), candidates),
        dataset=dataset,
        split=split,
        instructions=instructions,
        instructions_manifest=manifest,
        candidates_manifest=_manifest_beside(candidates.path) if candidates else {},
    )


def _origins(systems: list[System], candidates: Candidates | None, runs: list[Run]) -> list[Origin]:
    """What states which split it belongs to. A run that was scored on another split stays a matter of it."""
    foreign = {
        str(Path(weights).resolve())
        for system in systems
        if system.records.made.get("trained_on_other_split")
        for weights in system.records.made.get("weights", ())
    }
    found = [replace(each.records.origin, what=str(each.path)) for each in systems]
    found += [candidates.origin] if candidates else []
    for run in runs:
        if str(run.folder.resolve()) not in foreign:
            stated = run.manifest.get("instructions", run.manifest)
            found.append(Origin.of_manifest(run.folder, stated, "was trained on"))
    return found


def _check_options(options: ReportOptions) -> None:
    if options.examples < 0:
        raise DataError(f"--examples {options.examples}: expected 0 or more")
    if not options.ks:
        raise DataError("--ks: expected at least one cutoff")
    if options.instructions is not None and options.dataset is None:
        raise DataError("--instructions needs --dataset, which the prompts were made from")


def _read_ablation(words: tuple[str, ...], candidates: Candidates | None) -> list[System]:
    systems: list[System] = []
    for word in words:
        name, equals, file = word.partition("=")
        if not (name.strip() and equals and file):
            raise DataError(f"--ablation {word!r}: expected name=file, as in image=scores/image-only.parquet")
        if name in (system.records.system for system in systems):
            raise DataError(f"--ablation: {name!r} is named twice")
        system = read_system(Path(file), candidates)
        systems.append(replace(system, records=replace(system.records, system=name)))
    if len(systems) == 1:
        raise DataError("--ablation: one system alone shows nothing; name two or more")
    return systems


def _check_part(protocol: str, part: str) -> None:
    ranked = "valid" if protocol.endswith("/valid") else "test"
    if "/" in protocol and ranked != part:
        raise DataError(f"the systems were measured under {protocol!r}: say --part {ranked}")


def _find_split(dataset: Dataset, candidates: Candidates | None, protocol: str) -> Split:
    """The split that the candidates lie in, or else the dataset's only one of that protocol."""
    if candidates is not None:
        place = candidates.path.absolute().parents
        if len(place) > 3 and place[3].name == "splits" and place[4].resolve() == dataset.folder.resolve():
            return Split.open(dataset.folder / "splits" / place[2].name, dataset=dataset)
    wanted = protocol.split("/")[0]
    found = [
        folder.parent
        for folder in sorted(dataset.folder.glob(f"splits/*/{MANIFEST}"))
        if read_json(folder, "a split").get("protocol") == wanted
    ]
    if len(found) != 1:
        said = "no split" if not found else f"{len(found)} splits ({', '.join(one.name for one in found)})"
        raise DataError(
            f"{dataset.folder} has {said} of protocol {wanted!r}, under which the systems were measured; "
            "give the candidate file inside its split by --candidates, or another --dataset"
        )
    return Split.open(found[0], dataset=dataset)


def _check_users(dataset: Dataset, system: System) -> None:
    for column, table in (("user", dataset.users), ("item", dataset.items)):
        named = getattr(system.records, column).cast(pl.String)
        if (unknown := ~named.is_in(table[column].implode())).any():
            raise DataError(
                f"{system.path}: {column} {named[unknown.arg_max()]!r} is not in {dataset.folder}; "
                "give the dataset that was ranked by --dataset"
            )


def _read_instructions(
    options: ReportOptions, dataset: Dataset | None, split: Split | None
) -> tuple[Path | None, dict[str, Any]]:
    if options.instructions is None or dataset is None or split is None:
        return None, {}
    part = open_part(options.instructions, options.part)
    check_same_origin(
        part.origin,
        split.origin,
        remedy="give the instructions that the system was asked",
        required=("dataset", "split"),
    )
    return part.path, part.manifest


def _read_scored(system: System, candidates: Candidates) -> Scored:
    frame, _ = read_table(system.path)
    keys = [key for key in candidates.frame.columns if key != "label" and key in frame.columns]
    extra = [name for name in ("probability", "outside") if name in frame.columns]
    for name in extra:
        if not frame[name].dtype.is_numeric():
            frame = frame.with_columns(pl.col(name).cast(pl.Float64, strict=False))
    frame = text_ids(frame, keys, str(system.path)).select(*keys, "score", *extra)
    joined = candidates.frame.join(frame, on=keys, how="left", maintain_order="left")
    for name in extra:
        wrong = ~joined[name].is_between(0, 1).fill_null(False)
        if wrong.any():
            row = joined.row(wrong.arg_max(), named=True)
            raise DataError(f"{system.path}: {describe(row)} has {name} {row[name]}; expected 0 to 1")
    columns = {name: joined[name].cast(pl.Float64).to_numpy() for name in ("score", *extra)}
    return Scored(
        system.records.system,
        system.path,
        columns["score"],
        joined["label"].to_numpy(),
        columns.get("probability"),
        columns.get("outside"),
    )


def _manifest_beside(path: Path) -> dict[str, Any]:
    manifest = path.parent / MANIFEST
    return read_json(manifest, "candidates") if manifest.exists() else {}

"""The systems of an evaluation, given by scores or by rank records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recllm.data.candidate_files import Candidates
from recllm.data.origins import Origin, check_same_origin, read_made
from recllm.data.tables import read_table, text_ids
from recllm.errors import DataError
from recllm.evaluation.coverage import Coverage
from recllm.evaluation.frames import COLUMNS, check_scores
from recllm.evaluation.metrics import pooled_auc
from recllm.evaluation.ranks import RankRecords, check_one_setting, rank_candidates, refuse_all_tied


@dataclass(frozen=True, eq=False)
class System:
    """One system to measure, from a score file or from a file of rank records."""

    path: Path
    records: RankRecords
    pooled_auc: float | None
    """Over all candidates; None where only ranks are known."""
    candidates: Candidates | None = None
    """The candidates that its scores were ranked among; None where only ranks are known."""

    @property
    def coverage(self) -> Coverage | None:
        """What it has content for; None where its file does not say, as of systems that need none."""
        return Coverage.of_made(self.records.made)


def read_system(path: Path, candidates: Candidates | None = None) -> System:
    """Reads rank records, or reads scores and ranks them among `candidates`.

    The system's name is the file's metadata `recllm.system`, or else the file's stem.

    Raises:
        DataError: The file holds neither, scores come without candidates, or the file states another protocol
            than the candidates; rank records were made from other candidates than those given; all scores
            of the system tie.
    """
    frame, metadata = read_table(path)
    if set(COLUMNS) <= set(frame.columns):
        records = RankRecords.load(path)
        refuse_all_tied(records, str(path))
        if candidates is not None:
            _check_made_from(records, path, candidates)
        return System(path, records, None)
    if candidates is None:
        if "score" not in frame.columns:
            raise DataError(
                f"{path}: neither scores (user, item, score) nor rank records ({', '.join(COLUMNS)}); "
                f"found columns {', '.join(frame.columns)}"
            )
        raise DataError(f"{path} holds scores; name the candidate file that they belong to by --candidates")
    made = read_made(metadata, path)
    origin = Origin.of_manifest(path, made, candidates=metadata.get("recllm.candidates"))
    check_same_origin(origin, candidates.origin, remedy="score the rows of that file")
    coverage = Coverage.of_made(made)
    if coverage is not None and coverage.pool != "all":
        candidates = coverage.candidates(candidates, text_ids(frame, ("item",), str(path))["item"].unique())
    stated = metadata.get("recllm.protocol")
    if stated and stated != candidates.protocol:
        raise DataError(
            f"{path} was scored under {stated!r}, but {candidates.path} is {candidates.protocol!r}; "
            "score the rows of that file"
        )
    hashes = candidates.origin.hashes
    known = {"data_hash": hashes.get("dataset"), "split_hash": hashes.get("split")}
    made = {**{name: each for name, each in known.items() if each}, **made}
    has_target = {"target"} <= set(candidates.frame.columns) & set(frame.columns)
    keys = ["user", "target", "item"] if has_target else ["user", "item"]
    scores = check_scores(frame, keys, str(path))
    names = {"protocol": candidates.protocol, "system": metadata.get("recllm.system") or stem(path)}
    try:
        records = rank_candidates(
            candidates.frame, scores, **names, fingerprint=candidates.fingerprint, made=made
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    refuse_all_tied(records, str(path))
    labeled = candidates.frame.join(scores, on=keys)
    both = labeled["label"].n_unique() == 2
    auc = pooled_auc(labeled["score"].to_numpy(), labeled["label"].to_numpy()) if both else None
    return System(path, records, auc, candidates)


def read_systems(paths: tuple[Path, ...], candidates: Candidates | None = None) -> list[System]:
    """Reads several systems that are to stand in one table; equal names are told apart by their files.

    Raises:
        DataError: There are none, a file is given twice, or two of them were measured under different
            protocols or on different candidates; both files are named.
    """
    if not paths:
        raise DataError("no score or rank files were given")
    _refuse_repeats(paths)
    systems = [read_system(Path(path), candidates) for path in paths]
    check_one_setting([(str(system.path), system.records) for system in systems])
    names = [system.records.system for system in systems]
    return [
        system if names.count(name) == 1 else _renamed(system, f"{name} ({system.path})")
        for system, name in zip(systems, names, strict=True)
    ]


def check_distinct(systems: Sequence[System]) -> None:
    """Raises a `DataError` where a system stands in a table twice: equal in name and file."""
    _refuse_repeats([system.path for system in systems], [system.records.system for system in systems])


def stem(path: Path) -> str:
    """The name of a file without its kind: `mine` for mine.parquet, mine.csv and mine.csv.gz."""
    return Path(path.name.removesuffix(".gz")).stem


def _refuse_repeats(paths: Sequence[Path], names: Sequence[str] | None = None) -> None:
    seen: dict[tuple[Path, str], Path] = {}
    for path, name in zip(paths, names or [""] * len(paths), strict=True):
        key = Path(path).resolve(), name
        if key in seen:
            also = f" (as {seen[key]})" if seen[key] != path else ""
            raise DataError(f"{path} is given twice{also}; give every file once")
        seen[key] = path


def _check_made_from(records: RankRecords, path: Path, candidates: Candidates) -> None:
    check_same_origin(
        replace(records.origin, what=str(path)), candidates.origin, remedy="give the candidates of its split"
    )
    if records.protocol != candidates.protocol:
        raise DataError(
            f"{path} was measured under {records.protocol!r}, but {candidates.path} is "
            f"{candidates.protocol!r}; rank records need no --candidates, and may have no other ones"
        )
    if records.candidates and records.candidates != candidates.fingerprint:
        raise DataError(
            f"{path} and {candidates.path} have the same protocol {records.protocol!r}, but their candidates "
            f"differ (fingerprints {records.candidates} and {candidates.fingerprint}); rank the scores again"
        )


def _renamed(system: System, name: str) -> System:
    return replace(system, records=replace(system.records, system=name))

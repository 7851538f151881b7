"""Frozen vectors of users: of the texts that a builder wrote about them, by a sentence encoder.

What a text about a user was made from decides whether a result means anything: MLLMRec's release shows its
model every interaction of the user, those of validation and test included. So the file's own metadata is
checked: the split must be the one that the ranker is trained on, and only its training part may have been
read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recllm.data.origins import Origin, check_same_origin
from recllm.data.splits import Split
from recllm.data.texts import near_texts, read_texts, text_path
from recllm.errors import DataError
from recllm.files import sha256
from recllm.mllm.embedding import DEFAULT_ENCODER
from recllm.rankers.features import Features


@dataclass(frozen=True, eq=False)
class UserFeatures(Features):
    """Vectors of texts about users, as `Features` has them of items; zero for users without a text.

    Attributes:
        leak: Whether the texts were written from held-out interactions.
        made_from: What else manifests and score files say of the texts; JSON types.
    """

    leak: bool = False
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        """What manifests and score files say of the texts."""
        return {"source": self.source, **self.made_from, "leak": self.leak}


def user_text_features(
    split: Split,
    name: str,
    *,
    allow_leak: bool = False,
    encoder: str = DEFAULT_ENCODER,
    device: str | None = None,
    progress: bool = False,
) -> UserFeatures:
    """Embeds the texts about users in DATASET/texts/<name>.parquet, kept in DATASET/embeddings.

    Args:
        split: The split whose training part they must have been written from.
        name: The file's name without its suffix.
        allow_leak: Take texts that were written from held-out interactions, to measure what that is worth.
        encoder: A sentence encoder, as in `recllm.mllm.embedding.find_encoder`.
        device: Where the encoder runs.
        progress: Show a bar.

    Raises:
        DataError: The file or the encoder is missing; the file was made from another dataset or split, has
            several texts of a user, or does not say what it was made from; it was written from held-out
            interactions and `allow_leak` is not set, or it is set and the texts are honest.
    """
    from recllm.mllm.embedding import find_encoder, stored_embeddings

    dataset = split.dataset
    path = text_path(dataset.folder, name)
    command = f"recllm build users {dataset.folder} --system mllmrec --split {split.folder.name} --model NAME"
    if not path.exists():
        raise DataError(f"{path} does not exist{near_texts(path)}; write it first: {command}")
    table, metadata = read_texts(path)
    made_from = Origin.of_manifest(path, metadata)
    check_same_origin(made_from, split.origin, remedy="make it again", required=("dataset", "split"))
    if metadata.get("part") != "train" or "leak" not in metadata or "user" not in table.columns:
        raise DataError(
            f"{path} is not one text for each user, written from the training part; expected what "
            f"`{command}` writes"
        )
    if (twice := table["user"].is_duplicated()).any():
        raise DataError(f"{path}: user {table['user'].filter(twice)[0]!r} has several texts; expected one")
    leak = metadata["leak"] is not False
    if leak and not allow_leak:
        raise DataError(
            f"{path} was written from every interaction of the users, held-out ones included "
            f"(--leak-all-interactions), so what it scores is no prediction. Write honest texts: {command}. "
            "To measure what the leak is worth, add --allow-leak"
        )
    if allow_leak and not leak:
        raise DataError(
            f"--allow-leak has no effect: {path} was written from training interactions alone; leave it out"
        )
    told = dataset.users.select("user").join(
        table.select("user", "text"), on="user", how="left", maintain_order="left"
    )
    texts = told["text"].fill_null("").to_list()
    found = find_encoder(encoder)
    folder = dataset.folder / "embeddings" / f"users-{name}-{found.fingerprint[:12]}"
    embedded = stored_embeddings(folder, texts, found, device=device, progress=progress)
    if not embedded.present.any():
        raise DataError(f"{path}: none of its {len(table):,} texts is about a user of {dataset.folder}")
    facts = {
        "texts": name,
        "texts_sha256": sha256(path),
        "model": metadata.get("model"),
        "item_texts": metadata.get("item_texts"),
    }
    return UserFeatures(
        embedded.vectors,
        embedded.present,
        f"{name}, embedded by {found.name} ({found.origin})",
        leak=leak,
        made_from=facts,
    )

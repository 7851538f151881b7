"""Instruction tuples on disk: TRL's `prompt` / `completion` rows with image paths, and who may know what.

The columns of DATASET/instructions/<name>/{train,valid,test}.parquet are in `recllm.data.instructions`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from recllm.builders.catalog import Catalog, ImageCheck
from recllm.builders.chats import Chat, Composer, told_ratings
from recllm.builders.instruction_rows import InstructionBuilder
from recllm.builders.keyword_chats import KeywordComposer
from recllm.builders.negatives import TrainingNegatives
from recllm.builders.options import InstructionOptions, check_least, check_parts, check_plain
from recllm.builders.preferences import Preferences
from recllm.builders.prompt_length import PromptLength
from recllm.builders.tasks import counts_of, shares_of
from recllm.builders.texts import describe_template
from recllm.config import refuse_given
from recllm.data.dataset import Dataset, describe_file
from recllm.data.instructions import write_rows
from recllm.data.keywords import ItemKeywords
from recllm.data.neighbors import Neighbors, neighbors_path
from recllm.data.splits import Split
from recllm.data.texts import ItemTexts, text_path
from recllm.errors import DataError
from recllm.evaluation.top_k_files import TopK
from recllm.files import MANIFEST, staged_folder, write_json
from recllm.prompts import TEMPLATES
from recllm.prompts.templates import Template, load_templates
from recllm.runs.provenance import describe_run

_SHOWN = 2  # rows that a dry run prints
_NAMED = 1000  # unusable images that a manifest names
_TOLD = (
    "users_without_summary",
    "targets_passed_over_without_summary",
    "targets_without_history",
    "rows_without_summary",
    "rows_without_target_image",
    "rows_without_viu_and_imsg",
    "explicit_negatives",
    "negatives_missing",
    "history_items_left_out",
    "targets_not_listed",
    "targets_without_neighbors",
    "next_keywords_without_answer",
    "choose_without_answer",
    "summarize_without_answer",
)
_OF_KEYWORDS = ("keywords", "neighbors", "tasks", "choices", "target_id")
_OF_OTHERS = ("cot_about", "preference", "visual", "summaries", "history_as", "profile", "user_id")
"""Options of the form mmsrarec alone, and of the other forms alone."""
_HISTORY = {"plain": 0, "cot": 0, "mmsrarec": 5}
"""How many of the latest items are listed by default; 5 is MMSRARec's n."""


def build_instructions(options: InstructionOptions) -> None:
    """Writes DATASET/instructions/<name>, or prints the first rows; see `InstructionOptions`.

    Raises:
        DataError: Texts are missing or may know too much, options contradict each other, a prompt is over its
            budget, or the folder exists.
    """
    _check(options)
    if options.history is None:
        options = replace(options, history=_HISTORY[options.form])
    dataset = Dataset.open(options.dataset)
    split = Split.open(dataset.folder / "splits" / options.split, dataset=dataset)
    folder = dataset.folder / "instructions" / _folder_name(options)
    _check_other_parts(folder, options)
    preferences = {part: _preferences(split, part, options) for part in options.parts}
    length = None
    if options.processor is not None:
        length = PromptLength(options.processor, dataset.folder, options.min_pixels, options.max_pixels)
    templates = load_templates(TEMPLATES, options.templates)
    neighbors = _neighbors(split, options)
    if options.form == "mmsrarec":
        composer, images, sources = _keyword_composer(dataset, options, templates, neighbors, length)
    else:
        composer, images, sources = _composer(dataset, options, templates, preferences, length)
    sampler = TrainingNegatives(split, options.negative_sampling, options.seed)
    top = TopK.read(options.top_k) if options.top_k is not None else None
    builders = [
        InstructionBuilder(split, part, options, composer, sampler, preferences[part], length, top)
        for part in options.parts
    ]
    if options.dry_run:
        for builder in builders:
            _preview(builder)
        return
    with staged_folder(folder, overwrite=options.overwrite) as staging:
        for builder in builders:
            write_rows(staging / f"{builder.part}.parquet", builder.rows())
        manifest = {
            "protocols": {builder.part: builder.protocol for builder in builders},
            "split_hash": split.split_hash,
            "data_hash": dataset.data_hash,
            "candidates": {builder.part: builder.candidates for builder in builders if builder.candidates},
            "settings": settings_of(options),
            "templates": {each.name: describe_template(each) for each in composer.templates},
            "texts": sources,
            "top_k": None if top is None else {"system": top.system, "k": top.k, **describe_file(top.path)},
            "neighbors": None if neighbors is None else _described(neighbors),
            "unusable_images": dict(islice(images.unusable.items(), _NAMED)),
            "unusable_images_count": len(images.unusable),
            "counts": {builder.part: dict(sorted(builder.counts.items())) for builder in builders},
            "files": {path.name: describe_file(path) for path in sorted(staging.glob("*.parquet"))},
            "run": describe_run(),
        }
        write_json(staging / MANIFEST, manifest)
    for builder in builders:
        counts = builder.counts
        print(
            f"{folder / builder.part}.parquet: {counts['rows']:,} rows of {counts['users']:,} users, "
            f"{counts['positives']:,} yes and {counts['negatives']:,} no"
            + (f"; {others}" if (others := counts_of(counts)) else "")
        )
        for what in _TOLD:
            if counts[what]:
                print(f"  {what.replace('_', ' ')}: {counts[what]:,}")
    for item, reason in islice(images.unusable.items(), _SHOWN):
        print(f"  no image of {item}: {reason}")


def _check(options: InstructionOptions) -> None:
    check_parts(options.parts)
    if options.form == "mmsrarec":
        _check_keywords(options)
    else:
        refuse_given(
            options, _OF_KEYWORDS, f"with --form {options.form}. Leave it out, or give --form mmsrarec"
        )
    check_least(0, negatives=options.negatives, history=options.history, seed=options.seed)
    check_least(0, targets_per_user=options.targets_per_user, text_limit=options.text_limit)
    check_least(1, limit=options.limit, max_prompt_tokens=options.max_prompt_tokens)
    for name in ("split", "preference", "visual", "summaries", "candidates", "name", "keywords", "neighbors"):
        check_plain(f"--{name}", getattr(options, name))
    if not (options.target_image or options.target_text):
        raise DataError("--no-target-image and --no-target-text together leave nothing of the target")
    if options.max_prompt_tokens is not None and options.processor is None:
        raise DataError("--max-prompt-tokens needs --processor, the model whose tokens are meant")
    if options.candidates is not None and set(options.parts) == {"train"}:
        raise DataError("--candidates are for the valid and test parts; training negatives are sampled")
    if options.top_k is not None and options.parts not in (("valid",), ("test",)):
        raise DataError("--top-k has the lists of one part; name it alone, by --parts valid or --parts test")
    if options.top_k is not None and options.candidates is not None:
        raise DataError("--top-k and --candidates both say which items to ask about; give one of them")


def _check_keywords(options: InstructionOptions) -> None:
    refuse_given(
        options, _OF_OTHERS, "with --form mmsrarec. Leave it out, or give the --form that has it (plain, cot)"
    )
    shares = shares_of(options.tasks)
    check_least(2, choices=options.choices)
    if options.history == 0 and set(shares) != {"yes_no"}:
        raise DataError("--history 0: only yes_no can be asked without a history; give --tasks yes_no")
    if "choose" not in shares:
        refuse_given(options, ("choices",), "without the task choose. Leave it out, or add choose to --tasks")
    if options.top_k is not None:
        refuse_given(
            options, ("tasks", "choices"), "with --top-k, whose rows are to be scored: they are yes_no alone"
        )
    elif options.keywords == "none" and "summarize" in shares:
        raise DataError(
            "--keywords none: titles do not recur, so there is nothing to summarize; leave that task out, "
            "for example --tasks yes_no next_keywords choose"
        )


def _folder_name(options: InstructionOptions) -> str:
    held_out = "" if "train" in options.parts else "-" + "-".join(options.parts)
    first_stage = f"-top-{options.top_k.stem}" if options.top_k is not None else ""
    return options.name or f"{options.split}-{options.form}{held_out}{first_stage}"


def _check_other_parts(folder: Path, options: InstructionOptions) -> None:
    """Refuses to replace a folder by one that lacks some of its parts."""
    kept = {path.stem for path in folder.glob("*.parquet")} - set(options.parts)
    if kept and options.overwrite and not options.dry_run:
        raise DataError(
            f"{folder} also has {', '.join(sorted(kept))}, which --overwrite would delete; name all "
            "--parts, or give another --name"
        )


def _preferences(split: Split, part: str, options: InstructionOptions) -> Preferences | None:
    if options.preference == "none" or options.form == "mmsrarec":
        return None
    path = text_path(split.dataset.folder, f"{options.preference}-{part}")
    preferences = Preferences.open(path, split, part)
    if preferences.metadata.get("tell_ratings", False) != options.tell_ratings:
        was, wanted = ("without", "with") if options.tell_ratings else ("with", "without")
        raise DataError(
            f"{path} was written {was} --tell-ratings, so its windows are of other histories; write it again "
            f"{wanted} --tell-ratings"
        )
    return preferences


def _composer(
    dataset: Dataset,
    options: InstructionOptions,
    templates: dict[str, Template],
    preferences: dict[str, Preferences | None],
    length: PromptLength | None,
) -> tuple[Composer, ImageCheck, dict[str, str]]:
    """Returns what writes the chats, what tells usable images, and the hashes of the texts that are read."""
    sources = {f"{options.preference}-{part}": each.sha256 for part, each in preferences.items() if each}
    read: dict[str, ItemTexts] = {}

    def texts(name: str, system: str) -> ItemTexts:
        if name not in read:
            command = f"recllm build items {dataset.folder} --system {system} --model NAME"
            read[name] = ItemTexts.open(dataset.folder, name, dataset, command)
            sources[name] = read[name].sha256
        return read[name]

    cot = options.form == "cot"
    visual = texts(options.visual, "mllm_srec") if cot else None
    combined = texts(options.summaries, "mllm_srec") if cot else None
    lines = combined
    if options.history and options.history_as == "summary":
        lines = texts(options.summaries, "mllm_srec")
    for each in read.values():
        each.tell_missing()
    if cot and any(preferences.values()):  # TUBC's turn repeats what TUBC was told
        lines = texts(_told_to_tubc(preferences), "mllm_srec")
    known = {token for each in read.values() for token in each.special_tokens}
    known |= {token for each in preferences.values() if each for token in each.metadata["special_tokens"]}
    catalog = Catalog(dataset, sorted(known | set(length.special_tokens if length else ())))
    images = ImageCheck(catalog)
    ratings = told_ratings(dataset, tell=options.tell_ratings)
    composer = Composer(catalog, templates, options, visual, combined, lines, images, ratings)
    return composer, images, sources


def _neighbors(split: Split, options: InstructionOptions) -> Neighbors | None:
    if options.form != "mmsrarec" or options.neighbors == "none":
        return None
    path = neighbors_path(split.dataset.folder, options.neighbors)
    neighbors = Neighbors.open(path, split, options.parts)
    found, wanted = neighbors.facts.get("targets_per_user", 0), options.targets_per_user
    if "train" in options.parts and found and (not wanted or wanted > found):
        raise DataError(
            f"{path} has neighbors of each user's latest {found} training targets, but --targets-per-user is "
            f"{wanted or '0 (all)'}; find them with `recllm retrieve neighbors --run RUN --targets-per-user "
            f"{wanted}`"
        )
    return neighbors


def _keyword_composer(
    dataset: Dataset,
    options: InstructionOptions,
    templates: dict[str, Template],
    neighbors: Neighbors | None,
    length: PromptLength | None,
) -> tuple[KeywordComposer, ImageCheck, dict[str, str]]:
    """As `_composer`, for the form mmsrarec."""
    keywords = None if options.keywords == "none" else ItemKeywords.open(dataset, options.keywords)
    known = set(length.special_tokens if length else ())
    sources = {}
    if keywords is not None:
        keywords.tell_missing()
        known |= set(keywords.special_tokens)
        sources[keywords.name] = keywords.sha256
    catalog = Catalog(dataset, sorted(known))
    images = ImageCheck(catalog)
    ratings = told_ratings(dataset, tell=options.tell_ratings)
    composer = KeywordComposer(
        catalog, templates, options, keywords, neighbors, images, dataset.item_codes, ratings
    )
    return composer, images, sources


def _described(neighbors: Neighbors) -> dict[str, Any]:
    """What a manifest says about the neighbors."""
    names = ("ranker", "top_k", "base", "time", "next_items")
    facts = {name: neighbors.facts.get(name) for name in names}
    return {"name": neighbors.path.stem, **facts, **describe_file(neighbors.path)}


def _told_to_tubc(preferences: dict[str, Preferences | None]) -> str:
    names = {each.metadata["item_texts"] for each in preferences.values() if each}
    if len(names) > 1:
        raise DataError(
            f"the parts' preferences were made from different item texts: {', '.join(sorted(names))}"
        )
    return names.pop()


def _preview(builder: InstructionBuilder) -> None:
    rows = list(islice(builder.rows(), 200))
    chats = [Chat(tuple(row["prompt"]), tuple(row["images"])) for row in rows]
    for row, chat in list(zip(rows, chats, strict=True))[:_SHOWN]:
        about = f"{row['task']}, label {row['label']}, images {row['images']}"
        print(f"--- {builder.part}: {row['id']} ({about})")
        if builder.length is not None:
            print(builder.length.text(row["id"], chat))
        else:
            print(orjson.dumps(row["prompt"], option=orjson.OPT_INDENT_2).decode())
        print(f"--- completion: {row['completion'][0]['content'][0]['text']}")
    if builder.length is not None and rows:
        lengths = [builder.length.of(row["id"], chat) for row, chat in zip(rows, chats, strict=True)]
        print(
            f"{builder.part}: prompts of {min(lengths):,} to {max(lengths):,} tokens, "
            f"{sum(lengths) / len(lengths):,.0f} on average (first {len(rows):,} rows)"
        )


def settings_of(options: InstructionOptions) -> dict[str, Any]:
    """Returns the options that decide the rows, for the manifest."""
    left_out = ("dataset", "name", "overwrite", "dry_run", "templates", "top_k")
    left_out += _OF_OTHERS if options.form == "mmsrarec" else _OF_KEYWORDS
    return {key: value for key, value in asdict(options).items() if key not in left_out}

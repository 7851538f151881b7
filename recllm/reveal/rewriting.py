"""`recllm build image-rewrites`: a model judges the prompts of some items by feedback, and rewrites them.

REVEAL eq. 3, Critic_X = VLM(Prompt_X, EvalInstr, G, Result_X), and eq. 4, Prompt_(X+1) = VLM(Critic_X, Prompt_X,
image): in one call as released, or in two as in the paper. Ground truth G and result Result_X come from
validation lists alone, as `recllm build image-feedback` counts them.

An answer is read strictly. One that is missing, cut off, of another form, longer than 40 words, without the
product, or about what no image shows leaves the prompt as it was, and is counted by reason.
"""  # noqa: E501

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
import polars as pl
from tyro.conf import arg

from recllm.builders.options import ModelOptions
from recllm.builders.session import Session
from recllm.builders.texts import describe_template
from recllm.config import refuse_given
from recllm.data.origins import made
from recllm.errors import DataError
from recllm.evaluation.score_files import check_absent
from recllm.files import sha256, write_file
from recllm.mllm.chat import Decoding, Request, Result, message
from recllm.processes import rank, sum_over_ranks
from recllm.prompts.reveal import (
    CRITIC,
    DIRECTIONS,
    REFINE,
    UPDATE,
    problem_of_prompt,
    read_answer,
    results_lines,
)
from recllm.prompts.safe_text import IMAGE_MARK
from recllm.reveal.feedback import Feedback
from recllm.reveal.prompt_files import METADATA_KEY, ImagePrompts

ANSWER_TOKENS = 192
"""Longest answer in tokens, as released."""
PROMPT_LIMIT, ANALYSIS_LIMIT = 400, 1000
"""Characters of a new prompt and of an analysis that are kept; ours. 40 words are fewer."""
REWRITTEN = "rewritten"
_ITEM_TITLE = 80  # characters of a rival's title
_DRAWS = 64  # random choices of which the one is taken that tells the fewest items their own feedback


@dataclass
class ImageRewriteOptions(ModelOptions):
    """Rewrites the image prompts of the items that feedback puts first: the next version of all prompts."""

    prompts: Annotated[Path | None, arg(metavar="FILE")] = None
    """The prompts to rewrite, here or below DATASET: texts/reveal-prompts.parquet, or a later version."""
    feedback: Annotated[Path | None, arg(metavar="FILE")] = None
    """Of `recllm build image-feedback`, from a ranker that was trained on vectors of these prompts."""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """The file for the next version. What became of each chosen item goes to NAME-rewrites.parquet beside
    it."""
    calls: Literal["one", "two"] = "one"
    """one: analysis and new prompt in one answer (released). two: critic, then update (the paper)."""
    share: float = 0.25
    """Share of the items with feedback that are rewritten, by priority; 0.25 as released."""
    choose: Literal["feedback", "random"] = "feedback"
    """random: as many items, drawn at random, each with the feedback of another one: a control that
    costs the same and knows nothing (ours)."""
    choice_seed: int = 0
    """Seed of --choose random."""


@dataclass(frozen=True)
class Outcome:
    """What became of one item.

    Attributes:
        status: `rewritten`, `unchanged`, or why the answer was not used.
        analysis: The critic's.
        prompt: The new prompt; empty unless `rewritten`.
        answers: What the model wrote, in each call.
    """

    status: str
    analysis: str = ""
    prompt: str = ""
    answers: tuple[str, ...] = ()


def rewrite_prompts(options: ImageRewriteOptions) -> Path | None:
    """Writes the next version of the prompts and returns its file; None for a dry run.

    Raises:
        DataError: An input is missing or of another state of the dataset, a file exists, no item has
            feedback, or no request was answered at all.
    """
    for name in ("prompts", "feedback", "out"):
        if getattr(options, name) is None:
            raise DataError(f"--{name} FILE is missing")
    if not 0 < options.share <= 1:
        raise DataError(f"--share {options.share}: expected above 0 and at most 1")
    refuse_given(options, ("tag",), "here: --out names the file. Leave it out")
    if options.choose == "feedback":
        refuse_given(options, ("choice_seed",), "with --choose feedback. Leave it out")
    if options.choice_seed < 0:
        raise DataError(f"--choice-seed {options.choice_seed}: expected 0 or more")
    beside = rewrites_path(options.out)
    if not options.dry_run:
        check_absent(options.out, beside, overwrite=options.overwrite)
    session = Session(options)
    prompts = ImagePrompts.read(options.prompts, session.dataset)
    feedback = Feedback.read(options.feedback, session.dataset)
    versions = _versions(prompts, session)
    chosen = choose_items(feedback.frame, _rewritable(session, prompts), options)
    chosen = chosen.head(options.limit) if options.limit is not None else chosen
    chats = _Chats(session, prompts.by_item(), feedback)
    decoding = session.decoding(ANSWER_TOKENS)
    if options.dry_run:
        first = CRITIC if options.calls == "two" else REFINE
        session.preview(first.name, chats.requests(first.name, chosen), decoding)
        return None
    outcomes = _one_call(session, chats, chosen, decoding) if options.calls == "one" else _two_calls(
        session, chats, chosen, decoding
    )  # fmt: skip
    if rank() == 0:
        _write(options, session, prompts, feedback, versions, chosen, outcomes, decoding)
    sum_over_ranks([0])
    return options.out


def rewrites_path(out: Path) -> Path:
    """Returns the file beside a version of the prompts that says how it came about."""
    return out.with_name(f"{out.stem}-rewrites.parquet")


def choose_items(frame: pl.DataFrame, rewritable: set[str], options: ImageRewriteOptions) -> pl.DataFrame:
    """Returns the feedback of the items to rewrite, those of the highest priority first.

    Released: a priority of at least the 75th percentile. Ours: the percentile is over the items that have
    feedback, an image and a prompt, and an item of priority 0 is never chosen.

    Args:
        frame: A row for each item.
        rewritable: Items with an image and a prompt.
        options: `share`, `choose`, `choice_seed`.

    Returns:
        Rows of `frame`. For `random`, the ids are drawn and the rest is of the items that feedback chooses
        (`feedback_of`), of another item as far as there are any.

    Raises:
        DataError: No such item has a priority.
    """
    known = frame.filter(
        pl.col("id").is_in(list(rewritable)) & ((pl.col("exposures") + pl.col("targets")) > 0)
    )
    if known.is_empty() or not known["priority"].max():
        raise DataError(
            f"{options.feedback}: no item with an image and a prompt has feedback; score the ranker with "
            "--part valid and a larger --top-k, or give more users"
        )
    least = float(np.quantile(known["priority"].to_numpy(), 1 - options.share))
    chosen = known.filter((pl.col("priority") >= least) & (pl.col("priority") > 0))
    chosen = chosen.sort("priority", "id", descending=[True, False])
    if options.choose == "feedback":
        return chosen
    told = chosen["id"].to_numpy()
    order = np.random.default_rng([options.choice_seed, 0x5EED]).permutation(sorted(rewritable))
    draws = [np.roll(order, -start)[: len(told)] for start in range(min(len(order), _DRAWS))]
    drawn = min(draws, key=lambda each: int((each == told).sum()))
    return chosen.with_columns(id=pl.Series(drawn.tolist(), dtype=pl.String), feedback_of=chosen["id"])


def _rewritable(session: Session, prompts: ImagePrompts) -> set[str]:
    catalog = session.catalog
    written = {item for item, prompt in prompts.by_item().items() if prompt.strip()}
    return {item for code, item in enumerate(catalog.ids) if item in written and catalog.image(code)}


def _versions(prompts: ImagePrompts, session: Session) -> dict[str, int]:
    """Returns how often each prompt was rewritten before."""
    frame = prompts.frame
    if unknown := set(frame["id"]) - set(session.catalog.ids):
        raise DataError(f"{prompts.path}: no item {min(unknown)!r} in {session.dataset.folder}")
    if "version" not in frame.columns:
        return dict.fromkeys(frame["id"], 0)
    if not frame["version"].dtype.is_integer() or frame["version"].null_count():
        raise DataError(f"{prompts.path}: the column 'version' must hold integers without gaps")
    return dict(frame.select("id", "version").iter_rows())


class _Chats:
    """The requests about items."""

    def __init__(self, session: Session, prompts: Mapping[str, str], feedback: Feedback) -> None:
        self._session, self._prompts, self._length = session, prompts, feedback.made["lists"]
        self._code = {item: code for code, item in enumerate(session.catalog.ids)}

    def requests(
        self, name: str, chosen: pl.DataFrame, analyses: Mapping[str, str] | None = None
    ) -> Iterator[Request]:
        """Yields a request for each chosen item, with its image unless it is the critic's.

        Args:
            name: The template.
            chosen: Rows of feedback.
            analyses: What the critic said, for `reveal.update`; items without are passed over.
        """
        template, catalog = self._session.templates[name], self._session.catalog
        for row in chosen.iter_rows(named=True):
            item, code = row["id"], self._code[row["id"]]
            if analyses is not None and item not in analyses:
                continue
            values = {
                "title": catalog.title(code),
                "category": catalog.narrowest_category(code),
                "prompt": catalog.safe(self._prompts[item]),
                "results": results_lines(
                    {**row, "lists": self._length}, *map(self._titles, (row["rivals"], row["wanted"]))
                ),
                "direction": DIRECTIONS[row["kind"]],
                "analysis": (analyses or {}).get(item, ""),
            }
            text = template.fill({name: values[name] for name in template.fields}, catalog.special_tokens)
            if name == CRITIC.name:
                yield Request(item, (message("user", text),))
            else:
                yield Request(item, (message("user", IMAGE_MARK + text),), (catalog.image_path(code),))

    def accepted(self, item: str, prompt: str) -> tuple[str, str]:
        """Returns the status of a new prompt, and the prompt as it is kept."""
        catalog, code = self._session.catalog, self._code[item]
        safe = catalog.safe(prompt, PROMPT_LIMIT)
        problem = problem_of_prompt(safe, catalog.title(code), catalog.narrowest_category(code))
        if problem is not None:
            return problem, ""
        return ("unchanged", "") if safe == self._prompts[item] else (REWRITTEN, safe)

    def safe(self, analysis: str) -> str:
        return self._session.catalog.safe(analysis, ANALYSIS_LIMIT)

    def _titles(self, items: list[str]) -> list[str]:
        catalog = self._session.catalog
        titles = [catalog.safe(catalog.title(self._code[item]), _ITEM_TITLE) for item in items]
        return [title for title in titles if title]


def _one_call(
    session: Session, chats: _Chats, chosen: pl.DataFrame, decoding: Decoding
) -> dict[str, Outcome]:
    generated = session.answer(REFINE.name, chats.requests(REFINE.name, chosen), decoding)
    _check_some_answered(generated)
    outcomes = {}
    for item, result in generated.results():
        reading = read_answer(result.text, ("Analysis", "Prompt"), cut_off=result.finish == "length")
        if (problem := _no_answer(result) or reading.problem) is not None:
            outcomes[item] = Outcome(problem, answers=(result.text,))
            continue
        status, prompt = chats.accepted(item, reading.sections["Prompt"])
        analysis = chats.safe(reading.sections["Analysis"])
        outcomes[item] = Outcome(status, analysis, prompt, (result.text,))
    return outcomes


def _two_calls(
    session: Session, chats: _Chats, chosen: pl.DataFrame, decoding: Decoding
) -> dict[str, Outcome]:
    judged = session.answer(CRITIC.name, chats.requests(CRITIC.name, chosen), decoding)
    _check_some_answered(judged)
    outcomes = {}
    for item, result in judged.results():
        reading = read_answer(result.text, ("Analysis",), cut_off=result.finish == "length")
        problem = _no_answer(result) or reading.problem
        analysis = "" if problem else chats.safe(reading.sections["Analysis"])
        outcomes[item] = Outcome(problem or "", analysis, answers=(result.text,))
    analyses = {item: outcome.analysis for item, outcome in outcomes.items() if not outcome.status}
    updated = session.answer(UPDATE.name, chats.requests(UPDATE.name, chosen, analyses), decoding)
    for item, result in updated.results():
        before = outcomes[item]
        answers = (*before.answers, result.text)
        reading = read_answer(result.text, ("Prompt",), cut_off=result.finish == "length")
        problem = _no_answer(result) or reading.problem
        status, prompt = (problem, "") if problem else chats.accepted(item, reading.sections["Prompt"])
        outcomes[item] = replace(before, status=status, prompt=prompt, answers=answers)
    return outcomes


def _no_answer(result: Result) -> str | None:
    return None if result.error is None else "no answer"


def _check_some_answered(generated: Any) -> None:
    counts = generated.counts
    if counts.failed and counts.failed == counts.unique:
        item, reason = next(generated.errors())
        raise DataError(f"none of {counts.requests:,} requests was answered; {item}: {reason}")


def _write(
    options: ImageRewriteOptions,
    session: Session,
    prompts: ImagePrompts,
    feedback: Feedback,
    versions: Mapping[str, int],
    chosen: pl.DataFrame,
    outcomes: Mapping[str, Outcome],
    decoding: Decoding,
) -> None:
    """Writes the record of what was asked, then the next version of the prompts."""
    old, counted = prompts.by_item(), Counter(outcome.status for outcome in outcomes.values())
    new = {item: outcome.prompt for item, outcome in outcomes.items() if outcome.status == REWRITTEN}
    steps = (REFINE,) if options.calls == "one" else (CRITIC, UPDATE)
    facts = made(
        data_hash=session.dataset.data_hash,
        split_hash=feedback.made.get("split_hash"),
        prompts_sha256=prompts.sha256,
        feedback_sha256=sha256(feedback.path),
        model=session.backend.identity,
        decoding=decoding.as_dict(),
        templates={each.name: describe_template(session.templates[each.name]) for each in steps},
        **{name: getattr(options, name) for name in ("calls", "share", "choose", "choice_seed")},
        outcomes=dict(sorted(counted.items())),
    )
    metadata = {METADATA_KEY: orjson.dumps(facts).decode()}
    told = [outcomes[item] for item in chosen["id"]]
    record = chosen.with_columns(
        version=pl.Series([versions[item] for item in chosen["id"]], dtype=pl.Int64),
        old=pl.Series([old[item] for item in chosen["id"]], dtype=pl.String),
        status=pl.Series([each.status for each in told], dtype=pl.String),
        new=pl.Series([each.prompt for each in told], dtype=pl.String),
        analysis=pl.Series([each.analysis for each in told], dtype=pl.String),
        answers=pl.Series([list(each.answers) for each in told], dtype=pl.List(pl.String)),
    )
    ids = prompts.frame["id"].to_list()
    table = pl.DataFrame(
        {
            "id": ids,
            "text": [new.get(item, old[item]) for item in ids],
            "version": [versions[item] + (item in new) for item in ids],
        },
        schema_overrides={"version": pl.Int64},
    )
    beside = rewrites_path(options.out)
    write_file(beside, lambda temporary: record.write_parquet(temporary, metadata=metadata))
    write_file(options.out, lambda temporary: table.write_parquet(temporary, metadata=metadata))
    kept = ", ".join(f"{count:,} {status}" for status, count in counted.most_common() if status != REWRITTEN)
    print(
        f"{options.out}: {counted[REWRITTEN]:,} of {len(chosen):,} chosen prompts rewritten"
        + (f"; kept as they were: {kept}" if kept else "")
        + f". {beside} has each with its feedback, analysis and answer"
    )

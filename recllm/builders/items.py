"""Texts about items: image understanding, summaries, descriptions, keywords; each item once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import polars as pl

from recllm.builders.catalog import ID_LIMIT, Catalog
from recllm.builders.options import ItemOptions
from recllm.builders.session import Session, timeless_run
from recllm.data.keywords import write_keywords
from recllm.errors import DataError
from recllm.mllm.chat import Request, Result, message
from recllm.processes import rank
from recllm.prompts.keywords import read_keywords
from recllm.prompts.safe_text import IMAGE_MARK, safe_text
from recllm.prompts.templates import Template

VIU_TOKENS, IMSG_TOKENS, DESCRIPTION_TOKENS, KEYWORD_TOKENS = 200, 200, 160, 48
"""Longest answers: 200 as MLLM-MSR has it; VLM4Rec has 150, MLLMRec asks for 100 words; the last is ours."""

Answers = Iterable[tuple[str, Result]]


def summarize_items(options: ItemOptions) -> None:
    """Writes the texts of one system about the items of a dataset; see `ItemOptions`."""
    session = Session(options)
    SYSTEMS[options.system](session, options)


def image_requests(catalog: Catalog, codes: Iterable[int], prompt: Callable[[int], str]) -> Iterator[Request]:
    """Yields a request for each item with an image: the image, then the text."""
    for code in codes:
        path = catalog.image_path(code)
        if path is not None:
            chat = (message("user", IMAGE_MARK + prompt(code)),)
            yield Request(catalog.ids[code], chat, (path,))


def text_requests(
    catalog: Catalog, codes: Iterable[int], template: Template, visual: Answers | None = None
) -> Iterator[Request]:
    """Yields a request for each item of which something is known.

    Args:
        catalog: The items.
        codes: Which of them, ascending.
        template: Takes title, categories, text and, with `visual`, `visual_summary`.
        visual: What was said of the images, in the order of the items; those without an answer may be absent.
    """
    summaries = iter(visual or ())
    upcoming = next(summaries, None)
    for code in codes:
        fields = catalog.fields(code)
        if visual is not None:
            fields["visual_summary"] = ""
            if upcoming is not None and upcoming[0] == catalog.ids[code]:
                fields["visual_summary"] = catalog.safe(upcoming[1].text)
                upcoming = next(summaries, None)
        if any(fields.values()):
            yield Request(
                catalog.ids[code], (message("user", template.fill(fields, catalog.special_tokens)),)
            )


def _mllm_srec(session: Session, options: ItemOptions) -> None:
    """VIU (equation 1 of MLLM-SRec), then IMSG (equation 2)."""
    viu, imsg = session.templates["mllm_srec.viu"], session.templates["mllm_srec.imsg"]
    seeing, telling = session.decoding(VIU_TOKENS), session.decoding(IMSG_TOKENS)
    session.check_free("viu", "imsg")
    catalog, codes = session.catalog, _codes(session)
    looks = image_requests(catalog, codes, lambda code: viu.fill({}, catalog.special_tokens))
    if options.dry_run:
        seen = [(request.id, result) for request, result in session.preview("viu", looks, seeing)]
        tried = {item for item, _ in seen}
        some = [code for code in codes if catalog.ids[code] in tried] or codes[: options.batch_size]
        session.preview("imsg", text_requests(catalog, some, imsg, seen), telling, total=len(codes))
        return
    visual = session.answer("viu", looks, seeing)
    session.write("viu", visual, seeing, [viu], _facts(session))
    combined = session.answer("imsg", text_requests(catalog, codes, imsg, visual.results()), telling)
    session.write("imsg", combined, telling, [viu, imsg], _facts(session))


def _one_image_step(
    session: Session,
    options: ItemOptions,
    name: str,
    template: Template,
    values: Callable[[int], dict[str, str]],
) -> None:
    decoding = session.decoding(DESCRIPTION_TOKENS)
    session.check_free(name)
    tokens = session.catalog.special_tokens
    requests = image_requests(
        session.catalog, _codes(session), lambda code: template.fill(values(code), tokens)
    )
    if options.dry_run:
        session.preview(name, requests, decoding)
        return
    session.write(name, session.answer(name, requests, decoding), decoding, [template], _facts(session))


def _vlm4rec(session: Session, options: ItemOptions) -> None:
    """Visual semantic grounding (equation 6 of VLM4Rec)."""
    name = "vlm4rec.grounding_with_title" if options.with_title else "vlm4rec.grounding"
    template, step = session.templates[name], name.removeprefix("vlm4rec.").replace("_", "-")
    _one_image_step(session, options, step, template, lambda code: {"title": session.catalog.title(code)})


def _mllmrec(session: Session, options: ItemOptions) -> None:
    """Semantic description (equation 1 of MLLMRec); its concatenation with the text is the reader's."""
    template = session.templates["mllmrec.description"]
    values = {"dataset_name": safe_text(options.dataset_name, limit=ID_LIMIT)}
    if not values["dataset_name"]:
        raise DataError("--dataset-name is empty; say what the catalog is, for example `Amazon Baby`")
    _one_image_step(session, options, "description", template, lambda code: values)


def _mmsrarec(session: Session, options: ItemOptions) -> None:
    """Keywords of image and text, asked for separately (MMSRARec, stage 1), and parsed into one list."""
    seeing = session.templates["mmsrarec.image_keywords"]
    reading = session.templates["mmsrarec.text_keywords"]
    decoding = session.decoding(KEYWORD_TOKENS)
    names = ("image-keywords", "text-keywords", "keywords")
    session.check_free(*names)
    looks = image_requests(
        session.catalog, _codes(session), lambda code: seeing.fill({}, session.catalog.special_tokens)
    )
    reads = text_requests(session.catalog, _codes(session), reading)
    if options.dry_run:
        session.preview(names[0], looks, decoding)
        session.preview(names[1], reads, decoding)
        return
    of_images = session.answer(names[0], looks, decoding)
    session.write(names[0], of_images, decoding, [seeing], _facts(session))
    of_texts = session.answer(names[1], reads, decoding)
    session.write(names[1], of_texts, decoding, [reading], _facts(session))
    if rank() == 0:
        path = session.text_path(names[2])
        dropped: Counter[str] = Counter()
        table = keyword_table(session.catalog.ids, of_images.results(), of_texts.results(), dropped)
        tokens = list(session.backend.special_tokens)
        facts = {"data_hash": session.dataset.data_hash, "dropped": dict(dropped), "run": timeless_run()}
        write_keywords(path, table, **facts, model=session.backend.identity, special_tokens=tokens)
        print(f"{path}: {len(table):,} items, {table['keywords'].list.len().mean() or 0:.1f} keywords each")
        if dropped:
            left_out = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common())
            print(f"  left out of the answers: {left_out}")


def keyword_table(
    ids: Iterable[str], of_images: Answers, of_texts: Answers, dropped: Counter[str] | None = None
) -> pl.DataFrame:
    """Returns the clean keyword lists: `id, keywords, image_keywords, text_keywords`.

    `keywords` are those of the image, then those of the text that the image did not have. Items without any
    are left out.

    Args:
        ids: The items.
        of_images: Answers about images.
        of_texts: Answers about texts.
        dropped: What was left out of the answers is added to it, by reason.
    """
    dropped = Counter() if dropped is None else dropped
    lists: list[dict[str, list[str]]] = [
        {item: _clean(result, dropped) for item, result in answers} for answers in (of_images, of_texts)
    ]
    rows = []
    for item in ids:
        image, text = (each.get(item, []) for each in lists)
        both: dict[str, str] = {}
        for word in [*image, *text]:
            both.setdefault(word.casefold(), word)
        if both:
            rows.append((item, list(both.values()), image, text))
    words = pl.List(pl.String)
    schema = {"id": pl.String, "keywords": words, "image_keywords": words, "text_keywords": words}
    return pl.DataFrame(rows, schema=schema, orient="row")


def _clean(answer: Result, dropped: Counter[str]) -> list[str]:
    """The keywords of an answer, each made safe; parsed first, because line breaks separate keywords."""
    read = read_keywords(answer.text, cut_off=answer.finish == "length")
    dropped.update(read.dropped)
    words = (safe_text(word, limit=ID_LIMIT) for word in read.words)
    return list({word.casefold(): word for word in words if word}.values())


SYSTEMS: dict[str, Callable[[Session, ItemOptions], None]] = {
    "mllm_srec": _mllm_srec,
    "vlm4rec": _vlm4rec,
    "mllmrec": _mllmrec,
    "mmsrarec": _mmsrarec,
}


def _codes(session: Session) -> range:
    return range(len(session.catalog))[: session.options.limit]


def _facts(session: Session) -> dict[str, int]:
    """How many items there are to write of, and how many of them have no image."""
    codes = _codes(session)
    return {"items": len(codes), "without_image": sum(session.catalog.image(code) is None for code in codes)}

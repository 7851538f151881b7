"""Keywords from a model's answer, in the forms that models really answer in.

Models are asked for keywords separated by commas. They answer with bulleted or numbered lists, JSON,
Markdown, hashtags, a sentence before and after, an explanation behind each keyword, or "None".
`read_keywords` returns the keywords and counts what it left out. Decisions that a reader may want to know:

* A label is left out: `Color: red` is "red". So a title with a colon loses its first half. If an explanation
  follows (`Striped: the mug has stripes`), the keyword is what stands before the colon.
* A comma between two digits does not separate: "1,5 l" and "10,000 pieces" are one keyword each.
* A slash separates if it has spaces around it or three letters on each side: "red/blue" is two keywords;
  "AC/DC", "1/2" and "km/h" are one each.
* Hyphens, "&" and "+" belong to a keyword ("3-in-1", "salt & pepper", "C++"); a hyphen with spaces separates.
* Two keywords are the same if they differ in case or punctuation alone ("T-shirt", "t shirt").
* A JSON object gives its values; if these are all numbers, its keys.
* A keyword of more than eight words, or with a subject and a verb, is a sentence.

Everything is ours; the papers do not say how they read answers. Time is linear in the length of the answer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from recllm.prompts.answer_words import (
    ABBREVIATIONS,
    ABOUT_KEYWORDS,
    ACKNOWLEDGMENTS,
    ATTRIBUTE,
    CJK_PROSE,
    LABEL,
    OPENER,
    PLACEHOLDER,
    STRONG_OPENER,
    SUBJECT,
    VERBS,
)

LONGEST_ANSWER = 100_000
_LONGEST_JSON = 20_000
_LONGEST_PIECE = 400
_LONGEST_LABEL = 160
_MOST_WORDS, _MOST_CJK = 8, 24

_REASONING = re.compile(
    r"<(/?)(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad)>", re.IGNORECASE
)
_MARKUP = re.compile(
    r"<\|[^|<>]{0,40}\|>|</?[a-z][a-z0-9_-]{0,20}\s?/?>|\\(?:boxed|text|textbf)\b"
    r"|(?:```|~~~)(?:(?:json|python|text|txt|plaintext|markdown|md|csv|yaml|xml|html)\b)?",
    re.IGNORECASE,
)
_ALONE_STAR = re.compile(r"(?<!\S)\*(?!\S)")
_TRANSLATE = str.maketrans(
    {
        **dict.fromkeys("\t\v\f\r\x1c\x1d\x1e\x85\u2028\u2029", "\n"),
        **dict.fromkeys("[]{}<【】「」『』《》〈〉", " "),
        **dict.fromkeys("*`", ""),
        **{"（": "(", "）": ")", "：": ": ", "．": ". ", "／": " / ", "｜": "|", "＃": "#"},
    }
)
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]")
_KANJI = r"[\u3040-\u30ff\u3400-\u9fff]"
_SEPARATOR = re.compile(
    r"(?<!\d),|,(?!\d)|[;，；、،؛…•●○▪◦‣■□▶►→⇒|]|(?<!\S)[/\\–—·・~>»-]{1,3}(?!\S)"
    r"|(?<=[^\W\d_]{3})/(?=[^\W\d_]{3})|(?<!\S)#(?=[^\W\d_])"
    rf"|(?<={_KANJI})\s+(?={_KANJI})"
)
_NUMBER = re.compile(
    r"(?<![^\s,;:、，；])\(?(?:(\d{1,2})\s?(?:[.)]\s+|\)(?=[^\W\d])|、)|([a-z])\)\s+)", re.IGNORECASE
)
_CITED_NUMBER = re.compile(r"\[(\d{1,2})\](?=\s)")
_MARKS = re.compile(
    r"(?:(?:[-–—·+>~]+(?=\s)|\(?\d{1,2}\s?[.)](?=\s|$)|\(?\d{1,2}[)、]|\(?[a-z]\)|[①-⑳❶-❿])\s*)+",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"[a-z0-9]+(?:(?: & |[ '-])[a-z0-9]+)*\+*", re.ASCII | re.IGNORECASE)
"""What needs no taking apart."""
_END = re.compile(r"[.!?]+[\"'”’)]?(?:\s+|$)|[。！？।؟]+")
_COLON = re.compile(r":(?=[\s\"'“‘(])|(?<=[\"'])\s?:")


@dataclass(frozen=True)
class Keywords:
    """What was read from one answer.

    Attributes:
        words: The keywords in the order of the answer, each once.
        dropped: How many parts of the answer were left out, by reason: labels, sentences, placeholders,
            repetitions, reasoning blocks, keywords that are too long, cut off, or over the limit.
    """

    words: list[str]
    dropped: Counter[str] = field(default_factory=Counter)


def parse_keywords(text: str, *, most: int = 12, longest: int = 60) -> list[str]:
    """Returns the keywords in a model's answer; `read_keywords` also counts what it left out."""
    return read_keywords(text, most=most, longest=longest).words


def read_keywords(text: str, *, most: int = 12, longest: int = 60, cut_off: bool = False) -> Keywords:
    """Reads the keywords in a model's answer.

    Args:
        text: The answer. Of one longer than 100,000 characters the rest is not read.
        most: Number of keywords that are kept.
        longest: Number of characters that a keyword may have.
        cut_off: The answer reached its length limit, so its last keyword is incomplete and left out.

    Returns:
        The keywords. Joined by ", " and read again, they are the same.
    """
    dropped: Counter[str] = Counter()
    text = _MARKUP.sub("\n", _without_reasoning(text[:LONGEST_ANSWER], dropped))
    lines = _strings_in_json(text)
    if lines is None:
        plain = _CITED_NUMBER.sub(r"\1)", _ALONE_STAR.sub("\n", text)).translate(_TRANSLATE)
        lines = (_without_last(plain, dropped) if cut_off else plain).split("\n")
    words: dict[str, str] = {}
    for line in lines:
        for word in _words(" ".join(line.translate(_TRANSLATE).split()), dropped):
            if len(word) > longest:
                dropped["too long"] += 1
            elif (key := _key(word)) in words:
                dropped["repetitions"] += 1
            elif len(words) >= most:
                dropped["over the limit"] += 1
            else:
                words[key] = word
    return Keywords(list(words.values()), dropped)


def _without_reasoning(text: str, dropped: Counter[str]) -> str:
    """Takes away `<think>...</think>`; a block may have begun in the prompt, or not end."""
    kept: list[str] = []
    begin, depth = 0, 0
    for tag in _REASONING.finditer(text):
        if not tag[1]:
            if not depth:
                kept.append(text[begin : tag.start()])
            depth += 1
            continue
        dropped["reasoning"] += depth <= 1
        if not depth:
            kept.clear()
        depth = max(depth - 1, 0)
        begin = tag.end()
    if depth:
        dropped["reasoning"] += 1
    else:
        kept.append(text[begin:])
    return "\n".join(kept)


def _strings_in_json(text: str) -> list[str] | None:
    """Returns the strings of a JSON value that is the answer, or stands on a line or after a colon."""
    begin = min((place for place in map(text.find, "[{") if place >= 0), default=-1)
    if begin < 0 or not re.search(r"(?:^|[:：\n])[ \t]*$", text[max(0, begin - 40) : begin]):
        return None
    end = text.rfind("]" if text[begin] == "[" else "}") + 1
    if not 0 < end - begin <= _LONGEST_JSON:
        return None
    try:
        value = json.loads(text[begin:end])
    except (ValueError, RecursionError):
        return None
    found = list(_strings(value))
    return found if found or not value else None


def _strings(value: object) -> Iterator[str]:
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value.replace("\n", ", ")
        elif isinstance(value, list):
            stack += reversed(value)
        elif isinstance(value, dict):
            numbers = all(isinstance(each, int | float | None) for each in value.values())
            stack += reversed(list(value) if numbers else list(value.values()))


def _without_last(text: str, dropped: Counter[str]) -> str:
    """Takes away what follows the last separator or line break."""
    ends = [match.end() for match in re.finditer(rf"\n|{_SEPARATOR.pattern}", text)]
    end = ends[-1] if ends else 0
    if text[end:].strip():
        dropped["cut off"] += 1
    return text[:end]


def _words(line: str, dropped: Counter[str]) -> Iterator[str]:
    """Yields the keywords of one line; what is taken apart is looked at again, until it is one keyword."""
    stack = [line]
    while stack:
        part = stack.pop().strip()
        plain = _PLAIN.fullmatch(part) and part[:4].casefold() != "and "
        for divide in () if plain else (_numbered, _after_label, _sentences, _separated):
            if (smaller := divide(part, dropped)) != [part]:
                stack += reversed(smaller)
                break
        else:
            word = part if plain else _bare(part)
            if word != part:
                stack.append(word)
            elif not any(character.isalnum() for character in word):
                continue
            elif reason := _reason_against(word):
                dropped[reason] += 1
            else:
                yield word


def _numbered(line: str, _: Counter[str]) -> list[str]:
    """Splits "1) a 2) b" at numbers that count from 1, or takes away a list mark at the beginning."""
    parts, begin, expected, depth, looked = [], 0, 1, 0, 0
    for match in _NUMBER.finditer(line):
        depth = max(depth + _depth(line[looked : match.start()]), 0)
        looked = match.start()
        number = int(match[1]) if match[1] else ord(match[2].casefold()) - ord("a") + 1
        if number == expected and not depth:
            parts.append(line[begin : match.start()])
            marks = _MARKS.match(line, match.end())
            begin = looked = (marks or match).end()
            expected += 1
    if not parts and (marks := _MARKS.match(line)):
        begin = marks.end()
    return [*parts, line[begin:]]


def _depth(text: str) -> int:
    return text.count("(") - text.count(")")


def _after_label(line: str, dropped: Counter[str]) -> list[str]:
    """Returns a line without its labels; of a keyword with an explanation, the keyword."""
    begin, spaced = 0, f"{line} "
    while colon := _COLON.search(spaced, begin, begin + _LONGEST_LABEL):
        label = line[begin : colon.start()]
        about = ABOUT_KEYWORDS.search(label) or OPENER.match(label.lstrip())
        if not about and (_SEPARATOR.search(label) or len(_split_sentences(label)) > 1):
            break  # the label of a later keyword
        named, begin = _bare(label), colon.end()
        if not about and not ATTRIBUTE.fullmatch(named) and len(named.split()) <= 4:
            sentence, ended = _split_sentences(line[begin : begin + _LONGEST_PIECE])[0]
            if _is_prose(_bare(_SEPARATOR.split(sentence, maxsplit=1)[0]), ended):
                dropped["sentences"] += 1
                return [named]
        dropped["labels"] += any(character.isalnum() for character in named)
    return [line[begin:]]


def _sentences(line: str, dropped: Counter[str]) -> list[str]:
    """Returns a line's parts between full stops, without those that are sentences."""
    kept = []
    for part, ended in _split_sentences(line):
        if _is_prose(_bare(_SEPARATOR.split(part, maxsplit=1)[0]), ended):
            dropped["sentences"] += 1
        else:
            kept.append(part)
    return kept


def _separated(line: str, _: Counter[str]) -> list[str]:
    return _SEPARATOR.split(line)


def _split_sentences(line: str) -> list[tuple[str, bool]]:
    """Splits a line at full stops, with whether each part has one; "St. Louis" is one part."""
    parts, begin = [], 0
    for match in _END.finditer(line):
        word = line[max(begin, match.start() - 12) : match.start()].rpartition(" ")[2]
        point = match[0].startswith(".") and match.end() < len(line)
        if point and (word.casefold() in ABBREVIATIONS or "." in word or (len(word) == 1 and word.isalpha())):
            continue
        parts.append((line[begin : match.start()], True))
        begin = match.end()
    return parts if parts and begin == len(line) else [*parts, (line[begin:], False)]


def _reason_against(word: str) -> str | None:
    """Returns why a word is not a keyword; None if it is one."""
    if len(word) > _LONGEST_PIECE or _is_prose(word):
        return "sentences"
    if LABEL.fullmatch(word):
        return "labels"
    return "placeholders" if PLACEHOLDER.fullmatch(word) else None


def _is_prose(text: str, ended: bool = False) -> bool:
    """Tells a sentence from a keyword."""
    words = text.casefold().split()
    if len(words) > _MOST_WORDS or text.casefold() in ACKNOWLEDGMENTS:
        return True
    if not text.isascii() and (CJK_PROSE.fullmatch(text) or len(_CJK.findall(text)) > _MOST_CJK):
        return True
    if (len(words) >= 3 and ABOUT_KEYWORDS.search(text)) or (len(words) >= 2 and STRONG_OPENER.match(text)):
        return True
    if len(words) < (3 if ended else 4):
        return False
    return bool(OPENER.match(text) or (SUBJECT.match(text) and not VERBS.isdisjoint(words[1:_MOST_WORDS])))


def _bare(piece: str) -> str:
    """Takes away list marks, quotes and brackets around a keyword, also where one hides another."""
    word = " ".join(piece.split())
    if len(word) > _LONGEST_PIECE:
        return word
    while True:
        rest = word
        if ("(" in rest or ")" in rest) and not _balanced(rest):
            rest = rest.replace("(", " ").replace(")", " ")
        rest = _stripped(rest)
        rest = " ".join(rest[marks.end() if (marks := _MARKS.match(rest)) else 0 :].split())
        if rest[:4].casefold() == "and ":
            rest = rest[4:]
        if rest == word:
            return word
        word = rest


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0


def _stripped(word: str) -> str:
    """Strips what is neither letter, digit nor vowel sign, but for signs that belong to a keyword."""
    begin, end = 0, len(word)
    while begin < end and not (word[begin].isalnum() or word[begin] in "($€£¥₹"):
        begin += 1
    while begin < end and not (
        word[end - 1].isalnum() or word[end - 1] in ")+#%°" or unicodedata.category(word[end - 1])[0] == "M"
    ):
        end -= 1
    if begin < end and word[begin] == "(" and word[end - 1] == ")" and "(" not in word[begin + 1 : end]:
        return _stripped(word[begin + 1 : end - 1])
    return word[begin:end]


def _key(word: str) -> str:
    """Returns what is equal for keywords that differ in case or punctuation alone."""
    folded = word.casefold()
    if folded.isascii() and folded.replace(" ", "").isalnum():
        return folded
    folded = unicodedata.normalize("NFKC", folded)
    signs = (
        character
        if character in "#%&@" or unicodedata.category(character)[0] not in "PZ"
        else ("" if character in "'’" else " ")
        for character in folded
    )
    return " ".join("".join(signs).split()) or folded

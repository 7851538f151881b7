"""Words by which labels, sentences and placeholders in a model's answer are told from keywords."""

from __future__ import annotations

import re

ABBREVIATIONS = frozenset(
    [
        "st",
        "dr",
        "mr",
        "mrs",
        "ms",
        "no",
        "nos",
        "vs",
        "inc",
        "ltd",
        "co",
        "corp",
        "jr",
        "sr",
        "ft",
        "oz",
        "in",
        "lb",
        "lbs",
        "vol",
        "ed",
        "approx",
        "fl",
        "pt",
        "qt",
        "ca",
        "feat",
        "ver",
    ]
)

KEYWORD = (
    r"key[ -]?(?:words?|phrases?|terms?)|hash ?tags?|mots?[ -]cl[ée]s?|palabras? clave|palavras?[ -]chave"
    r"|parole chiave|schl(?:ü|ue)sselw(?:o|ö)rter|stichw(?:o|ö)rter|ключевые слова|关键词|關鍵詞|关键字"
    r"|キーワード|키워드|الكلمات"
)
ABOUT_KEYWORDS = re.compile(KEYWORD, re.IGNORECASE)
LABEL = re.compile(
    rf"(?:the )?(?:(?:image|text|title|item|product|visual|main|final) )?(?:{KEYWORD}|tags|answer|json)",
    re.IGNORECASE,
)
ATTRIBUTE = re.compile(
    r"(?:the )?(?:image|text|title|notes?|description|summary|explanation|reasoning|categor(?:y|ies)"
    r"|colou?rs?|materials?|styles?|patterns?|shapes?|brand|type|size|function|theme|mood|objects?|product|item)",
    re.IGNORECASE,
)
OPENER = re.compile(
    r"(?:here(?:['’]s| is| are)|below (?:is|are)|the following|these are"
    r"|this (?:is|image|item|product|picture)|based on|according to"
    r"|let me|i hope|i can|i can['’]t|i cannot|i['’]m|i am|i have|i would|i['’]d|i will"
    r"|i['’]ll|hope (?:this|that|these)|feel free|please|note that|if you|would you|do you|can you|could you"
    r"|as an ai|as requested|sorry|unfortunately|there (?:is|are)|you can|in (?:this|the) (?:image|picture)"
    r"|from the (?:image|text|title)|given the|looking at|sure|certainly|of course|okay|ok|great)\b",
    re.IGNORECASE,
)
STRONG_OPENER = re.compile(
    r"(?:i['’]m sorry|i am sorry|sorry|unfortunately|i can['’]t|i cannot|here(?:['’]s| is| are)|let me know"
    r"|feel free|i hope|as an ai)\b",
    re.IGNORECASE,
)
SUBJECT = re.compile(
    r"(?:but|the|this|that|these|those|it|its|they|he|she|we|you|i|a|an|there|each|both)\b", re.IGNORECASE
)
VERBS = frozenset(
    [
        "is",
        "are",
        "was",
        "were",
        "be",
        "has",
        "have",
        "had",
        "can",
        "will",
        "would",
        "could",
        "should",
        "may",
        "might",
        "does",
        "do",
        "did",
        "shows",
        "show",
        "showing",
        "depicts",
        "depict",
        "features",
        "feature",
        "includes",
        "include",
        "contains",
        "contain",
        "appears",
        "appear",
        "seems",
        "seem",
        "describes",
        "describe",
        "represents",
        "represent",
        "suggests",
        "suggest",
        "comes",
        "looks",
        "makes",
        "offers",
        "provides",
        "uses",
    ]
)
ACKNOWLEDGMENTS = frozenset(
    [
        "sure",
        "certainly",
        "of course",
        "absolutely",
        "okay",
        "ok",
        "great",
        "got it",
        "thanks",
        "thank you",
        "understood",
        "sure thing",
        "no problem",
        "you're welcome",
        "you’re welcome",
        "好的",
        "当然",
        "はい",
        "네",
        "claro",
        "natürlich",
        "gerne",
        "bien sûr",
        "voici",
        "конечно",
    ]
)
CJK_PROSE = re.compile(
    r"(?:这是|这个|该商品|该图|此图|图中|图片中|以下是|希望|如果您|请告诉|以上|この|これは|以下は|画像には).{3,}"
    r"|.{3,}(?:です|ます|ました|니다|세요)"
)
PLACEHOLDER = re.compile(
    r"none|etc|n/?a|n\.a|nil|null|nan|unknown|undefined|unspecified|nothing"
    r"|not (?:applicable|available|specified|provided|visible|mentioned|given|stated|clear)"
    r"|no (?:further |other |specific )?(?:key ?words?|images?|text|title|description|information|details?"
    r"|data)(?: (?:is |are )?(?:available|provided|given|visible|found|shown))?"
    r"|无|無|没有|暂无|未知|なし|不明|없음|aucune?|inconnue?|keine?|unbekannt|ningun[oa]|desconocid[oa]"
    r"|nessun[oa]|nenhum[a]?|нет|неизвестно|لا يوجد|لا شيء|غير معروف",
    re.IGNORECASE,
)

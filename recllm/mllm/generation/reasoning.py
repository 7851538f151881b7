"""Answers of models that think aloud: the reasoning is no part of the answer.

Known are blocks between `<think>` and `</think>` (Qwen3, DeepSeek, GLM; also begun by the prompt, or never
ended), their kin of other names, Kimi's and Mistral's signs, and the channels of gpt-oss.
"""

from __future__ import annotations

import re
from dataclasses import replace

from recllm.mllm.chat import Result

_NAMES = "(?:think|thinking|thought|thoughts|reasoning|reflection|seed:think)"
_OPENS = re.compile(
    rf"<{_NAMES}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>", re.IGNORECASE
)
_CLOSES = re.compile(
    rf"</{_NAMES}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>", re.IGNORECASE
)
_FINAL = re.compile(r"<\|channel\|>\s*final\s*(?:<\|message\|>)?|assistantfinal(?=\S)")
_CHANNEL = re.compile(r"\s*(?:<\|start\|>assistant)?(?:<\|channel\|>\s*analysis|analysis(?=[A-Z\"']))")
_ENDS = re.compile(r"<\|(?:return|end)\|>\s*$")


def without_reasoning(text: str) -> tuple[str, bool]:
    """Returns an answer without its reasoning, and whether there was any; "" where nothing else is there."""
    if _CHANNEL.match(text):
        finals = list(_FINAL.finditer(text))
        return (_ENDS.sub("", text[finals[-1].end() :]).strip() if finals else "", True)
    closed = list(_CLOSES.finditer(text))
    opened = _OPENS.match(text.lstrip())
    if closed and (opened or not _OPENS.search(text, 0, closed[0].start())):
        rest = text[closed[-1].end() :]
        return without_reasoning(rest)[0].strip() if _OPENS.match(rest.lstrip()) else rest.strip(), True
    return ("", True) if opened else (text, False)


def opens_reasoning(prompt: str) -> bool:
    """Tells whether a prompt ends within a reasoning block, so that the model goes on to think."""
    tail = prompt[-200:]
    last = None
    for last in _OPENS.finditer(tail):  # noqa: B007 - the last one counts
        pass
    return last is not None and not tail[last.end() :].strip()


def answered(result: Result) -> tuple[Result, bool]:
    """Returns a result without reasoning, and whether it had any; one without an answer is a failed one."""
    if result.error is not None:
        return result, False
    text, found = without_reasoning(result.text)
    if text.strip():
        return (replace(result, text=text) if found else result), found
    what = "an answer of reasoning alone" if found else "an empty answer"
    cut = " (cut: raise --max-new-tokens, or switch the model's thinking off)" if found else ""
    return Result.failed(result.key, f"empty: {what}{cut}"), found

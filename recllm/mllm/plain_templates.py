"""Chat templates that write texts as they are: such a chat is rendered by joining strings.

Rendering a chat with Jinja costs more than tokenizing what is new in it. Most templates of multimodal models
put each text into the prompt unchanged. Where a template provably does, a chat's prompt is the template's own
words with the texts between them, and those words depend on the chat's form alone: on its roles and on the
kinds of its parts. A template that trims, tests or copies texts is not of this kind.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_OF_FORM = ("role", "type")
"""Keys whose values belong to a chat's form."""
_TESTS = frozenset({"string", "defined", "undefined", "none", "mapping", "iterable", "sequence"})
_EXPRESSIONS = (
    *(nodes.Const, nodes.TemplateData, nodes.Name, nodes.NSRef, nodes.Getattr, nodes.Getitem, nodes.Slice),
    *(nodes.Test, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.CondExpr),
    *(nodes.Add, nodes.Sub, nodes.Concat, nodes.Mod, nodes.Call, nodes.Keyword, nodes.Filter),
)
_LOOP = frozenset({"first", "last", "index", "index0", "length", "revindex", "revindex0"})


class _NotPlain(Exception):
    """The template may do something else with a text than write it."""


@cache
def is_plain(template: str) -> bool:
    """Tells whether a chat template provably writes every text part once, as it is, or not at all.

    What it does may depend on roles, on kinds of parts and on their numbers, never on what a text says. It is
    given messages whose contents are lists of parts, `{"type": "text", "text": ...}` or `{"type": "image"}`.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    try:
        _check(environment.parse(template), {"messages"})
    except (_NotPlain, TemplateSyntaxError):
        return False
    return True


def words_of(render: Callable[[list[str]], str], texts: int) -> list[str] | None:
    """Returns what a plain template writes around the texts of a chat: one string more than texts.

    Args:
        render: Renders a chat of the form in question with these texts.
        texts: How many texts it has.

    Returns:
        None where the template does not write each text once, in order.
    """
    marks = [f"recllm{secrets.token_hex(8)}n{number}n" for number in range(texts)]
    rest, words = render(marks), []
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:
            return None
        words.append(before)
    words.append(rest)
    return None if any(mark in word for mark in marks for word in words) else words


def with_texts(words: Sequence[str], texts: Sequence[str]) -> str:
    """Returns the prompt of a chat whose texts are these."""
    parts = [word for pair in zip(words, texts, strict=False) for word in pair]
    return "".join([*parts, words[-1]])


def _check(node: nodes.Node, bound: set[str]) -> None:
    """Raises `_NotPlain` unless a statement is plain; `bound` names what holds messages or their parts."""
    if isinstance(node, nodes.For):
        if _reaches(node.iter, bound):
            _check_path(node.iter, bound)
            if not isinstance(node.target, nodes.Name):
                raise _NotPlain
            bound.add(node.target.name)
        else:
            _check_expression(node.iter, bound)
        if node.recursive:
            raise _NotPlain
        for each in (*node.body, *node.else_, *([node.test] if node.test else [])):
            _check(each, bound)
    elif isinstance(node, nodes.If):
        _check(node.test, bound)
        # Contents are lists, so what is written of contents that are strings is never reached.
        dead = isinstance(node.test, nodes.Test) and node.test.name == "string"
        dead = dead and _is_content(node.test.node) and _root(node.test.node) in bound
        for each in (*([] if dead else node.body), *node.elif_, *node.else_):
            _check(each, bound)
    elif isinstance(node, nodes.Output):
        for each in node.nodes:
            _check_written(each, bound)
    elif isinstance(node, nodes.Assign):
        if not isinstance(node.target, (nodes.Name, nodes.NSRef)) or _reaches(node.node, bound):
            raise _NotPlain
        if isinstance(node.target, nodes.Name) and node.target.name in bound | {"loop"}:
            raise _NotPlain
        _check(node.node, bound)
    elif isinstance(node, nodes.Template):
        for each in node.body:
            _check(each, bound)
    elif not isinstance(node, nodes.Break | nodes.Continue):
        _check_expression(node, bound)


def _check_written(node: nodes.Node, bound: set[str]) -> None:
    """Checks an expression that is written out: a text may stand in it alone or be added to other strings."""
    if _is_text(node):
        _check_path(node.node, bound)
    elif isinstance(node, nodes.Add):
        _check_written(node.left, bound)
        _check_written(node.right, bound)
    elif isinstance(node, nodes.Concat):
        for each in node.nodes:
            _check_written(each, bound)
    else:
        _check_expression(node, bound)


def _check_expression(node: nodes.Node, bound: set[str]) -> None:
    """Checks an expression whose value must not depend on what a text says."""
    if not isinstance(node, _EXPRESSIONS) or _is_text(node):
        raise _NotPlain
    if isinstance(node, nodes.Name):
        if node.name in bound | {"loop", "self", "caller"}:
            raise _NotPlain  # a message, a part or their list as a value
    elif isinstance(node, nodes.Getattr | nodes.Getitem) and _root(node) in bound:
        if _key(node) not in _OF_FORM:
            raise _NotPlain
        _check_path(node.node, bound)
    elif isinstance(node, nodes.Getattr) and _root(node) == "loop":
        if node.attr not in _LOOP or not isinstance(node.node, nodes.Name):
            raise _NotPlain
    elif isinstance(node, nodes.Test) and node.name in _TESTS and _root(node.node) in bound:
        _check_path(node.node, bound)
    elif isinstance(node, nodes.Filter):
        if node.name not in ("length", "count") or node.args or node.kwargs or _root(node.node) not in bound:
            raise _NotPlain
        _check_path(node.node, bound)
    elif isinstance(node, nodes.Compare) and [each.op for each in node.ops] in (["in"], ["notin"]):
        _check_expression(node.expr, bound)
        if _root(node.ops[0].expr) in bound:
            if not isinstance(node.expr, nodes.Const) or not isinstance(node.ops[0].expr, nodes.Name):
                raise _NotPlain
        else:
            _check_expression(node.ops[0].expr, bound)
    elif isinstance(node, nodes.Call):
        if not isinstance(node.node, nodes.Name) or node.node.name not in ("namespace", "raise_exception"):
            raise _NotPlain
        for each in (*node.args, *(keyword.value for keyword in node.kwargs)):
            _check_expression(each, bound)
        if node.dyn_args or node.dyn_kwargs:
            raise _NotPlain
    else:
        for each in node.iter_child_nodes():
            _check_expression(each, bound)


def _check_path(node: nodes.Node, bound: set[str]) -> None:
    """Checks a way from `messages` to a message, its content or a part: constant keys, and no text on it."""
    while isinstance(node, nodes.Getattr | nodes.Getitem):
        if _is_text(node):
            raise _NotPlain
        if isinstance(node, nodes.Getitem):
            _check_expression(node.arg, bound)
        node = node.node
    if not isinstance(node, nodes.Name) or node.name not in bound:
        raise _NotPlain


def _is_text(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Getattr | nodes.Getitem) and _key(node) == "text"


def _is_content(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Getattr | nodes.Getitem) and _key(node) == "content"


def _key(node: nodes.Node) -> Any:
    if isinstance(node, nodes.Getattr):
        return node.attr
    return node.arg.value if isinstance(node.arg, nodes.Const) else None


def _root(node: nodes.Node) -> str | None:
    while isinstance(node, nodes.Getattr | nodes.Getitem):
        node = node.node
    return node.name if isinstance(node, nodes.Name) else None


def _reaches(node: nodes.Node, bound: set[str]) -> bool:
    names = [node] if isinstance(node, nodes.Name) else node.find_all(nodes.Name)
    return any(each.name in bound for each in names)

"""R_rank: a choice among candidates, paid by where the right one is placed; and what is wrong with others."""

from __future__ import annotations

from recllm.training.rewards.answers import Answer

CHOICE_FAULTS = ("invalid", "repeated", "wrong")


def rank(answer: Answer) -> float:
    """R_rank, ours: 1 / r for the place r of the right candidate in the answer, 0 for any fault.

    An answer that is well formed and does not name the right candidate is worth as little as one that is
    not: a policy that is paid for validity learns to be valid (MLLMRec-R1 pays 0.3 for it).
    """
    return 0.0 if choice_fault(answer) else 1 / (1 + answer.ranking.index(answer.source.right))


def choice_fault(answer: Answer) -> str | None:
    """Returns what is wrong with a choice, None where nothing is.

    `invalid`: no list of numbers, a number that no candidate has, or more of them than were asked for.
    `repeated`: a candidate is named twice. `wrong`: the right one is not named.
    """
    source, ranking = answer.source, answer.ranking
    if len(set(ranking)) < len(ranking):
        return "repeated"
    if not ranking or len(ranking) > source.picks or not all(1 <= n <= source.candidates for n in ranking):
        return "invalid"
    return None if source.right in ranking else "wrong"

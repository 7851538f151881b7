"""Earlier answers of a prompt in the model's own words, against generating them by hand."""

from __future__ import annotations

import polars as pl
import pytest
import torch

from recllm.errors import DataError
from recllm.mllm import load
from recllm.mllm.chat import Decoding, Request, message, text_part
from recllm.mllm.generation.in_process import InProcessBackend
from recllm.mllm.scoring import YesNoScorer, score_table
from recllm.mllm.scoring.prompts import messages_of
from recllm.mllm.scoring.steps import with_generated_steps
from recllm.mllm.store import GenerationStore
from recllm.prompts.safe_text import IMAGE_MARK, safe_text
from tests.mllm.scoring.worlds import make_images, one_by_one
from tests.mllm.small_models import save_small

TOKENS = 6


@pytest.fixture
def world(tmp_path):
    images = make_images(tmp_path, 5)
    loaded = load(save_small("qwen2_vl", tmp_path / "model", seed=6))
    rows = []
    for user in range(3):
        for item in range(3):
            about = images[user]  # the history's, shared by the candidates
            turns = [
                message("user", f"{IMAGE_MARK}what is in this image"),
                message("assistant", "built answer"),
                message("user", f"describe user {user}"),
                message("assistant", "built summary"),
                message("user", f"mug {item} {IMAGE_MARK}"),
            ]
            if user == 2:
                turns = turns[:2] + turns[4:]
            rows.append(
                {
                    "id": f"{user}/{item}",
                    "user": str(user),
                    "item": str(item),
                    "label": 0,
                    "target": "0",
                    "prompt": turns,
                    "images": [about, images[item]],
                }
            )
    return tmp_path, loaded, pl.DataFrame(rows)


def by_hand(loaded, row, folder):
    """Continues one chat at a time with `generate`."""
    chat = list(messages_of(row))
    backend = InProcessBackend(loaded)
    for place, turn in enumerate(chat):
        if turn["role"] == "assistant":
            shown = sum(part["type"] == "image" for each in chat[:place] for part in each["content"])
            paths = tuple(folder / path for path in row["images"][:shown])
            request = Request("by hand", tuple(chat[:place]), paths)
            ((result,),) = backend.generate([(b"k" * 32, request)], Decoding(TOKENS))
            text = safe_text(result.text, special_tokens=loaded.special_tokens)
            chat[place] = {"role": "assistant", "content": [text_part(text)]}
    return tuple(chat)


def test_answers_are_generated_step_by_step_once_for_all_who_share_them(world, monkeypatch):
    folder, loaded, rows = world
    store = GenerationStore.open(folder / "generations")
    backend = InProcessBackend(loaded)
    asked = []
    generate = backend.generate
    monkeypatch.setattr(
        backend, "generate", lambda pairs, decoding: asked.extend(pairs) or generate(pairs, decoding)
    )
    found = with_generated_steps(rows, folder, backend, store, TOKENS)
    assert found.drop("prompt").equals(rows.drop("prompt"))
    assert found.schema == rows.schema
    for before, after in zip(rows.to_dicts(), found.to_dicts(), strict=True):
        assert messages_of(after) == by_hand(loaded, before, folder)
        assert [turn for turn in after["prompt"] if turn["role"] == "user"] == [
            turn for turn in before["prompt"] if turn["role"] == "user"
        ]
    assert len(asked) == 3 + 2  # three users' images, then the summaries of the two who have one
    asked.clear()
    assert with_generated_steps(rows, folder, backend, store, TOKENS).equals(found)
    assert not asked
    scorer = YesNoScorer(loaded, yes=("y",), no=("n",))
    margin, _ = one_by_one(loaded, found, folder, list(scorer.answers.yes), list(scorer.answers.no))
    scores = torch.tensor(score_table(scorer, found, folder)["margin"].to_list())
    torch.testing.assert_close(scores, torch.from_numpy(margin), atol=1e-4, rtol=0)
    assert (scores - torch.tensor(score_table(scorer, rows, folder)["margin"].to_list())).abs().max() > 1e-3


def test_an_answer_that_cannot_be_generated_is_named(world):
    folder, loaded, rows = world
    (folder / rows["images"][0][0]).write_bytes(b"no image")
    store = GenerationStore.open(folder / "generations")
    with pytest.raises(DataError, match="sample 0/0, answer 1: cannot be generated: image"):
        with_generated_steps(rows, folder, InProcessBackend(loaded), store, TOKENS)

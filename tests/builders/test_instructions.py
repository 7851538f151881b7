"""Instruction tuples: their form, their negatives, and that a user's candidates share a prefix."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from recllm.builders.histories import Histories
from recllm.builders.instructions import build_instructions
from recllm.builders.items import summarize_items
from recllm.builders.negatives import TrainingNegatives
from recllm.builders.options import InstructionOptions, ItemOptions, UserOptions
from recllm.builders.users import summarize_users
from recllm.cli import main
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.splits import Split
from recllm.data.texts import read_texts
from recllm.errors import DataError
from tests.builders.worlds import split_of, words_of, write_world
from tests.conftest import make_dataset


@pytest.fixture
def world(tmp_path, backend):
    """A world with a split and all the texts of MLLM-SRec."""
    world = write_world(tmp_path / "world")
    split_of(world)
    summarize_items(ItemOptions(world.folder, "rule"))
    summarize_users(UserOptions(world.folder, "rule", parts=("train", "valid", "test")))
    return world


def rows_of(world, part="train", name="loo-plain"):
    return pl.read_parquet(world.folder / "instructions" / name / f"{part}.parquet").to_dicts()


def test_plain_rows(world):
    build_instructions(InstructionOptions(world.folder))
    rows = rows_of(world)
    assert len(rows) == 24 and [row["label"] for row in rows] == [1, 0] * 12
    for row in rows:
        (turn,) = row["prompt"]
        assert turn["role"] == "user"
        assert [part["type"] for part in turn["content"]] == ["text", "image"]
        text = turn["content"][0]["text"]
        number = row["user"].removeprefix("user")
        assert f"Profile: Reads {number} books." in text and "Preference: " in text and "User:" not in text
        title = world.items.filter(pl.col("item") == row["item"])["title"][0]
        assert text.rstrip().split("Target item: ")[1].startswith(title)
        assert row["images"] == [f"images/{row['item']}.png"]
        answer = "Yes." if row["label"] else "No."
        assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        assert (row["item"] == row["target"]) == (row["label"] == 1)
        assert row["id"] == f"{row['target_row']}/{row['user']}/{row['item']}"
        assert world.interactions["item"][row["target_row"]] == row["target"]
        assert row["target_row"] not in row["shown"] and len(row["shown"]) == 6


def test_rows_have_the_form_that_trl_trains_on(world):
    data_utils = pytest.importorskip("trl.data_utils")
    build_instructions(InstructionOptions(world.folder, form="cot", history=2, history_as="image+title"))
    for row in rows_of(world, name="loo-cot"):
        assert data_utils.is_conversational(row)
        filled = data_utils.prepare_multimodal_messages(row["prompt"], images=list(row["images"]))
        shown = [p["image"] for turn in filled for p in turn["content"] if p["type"] == "image"]
        assert shown == row["images"]


def test_four_steps_precede_the_question(world):
    build_instructions(InstructionOptions(world.folder, form="cot"))
    viu = dict(pl.read_parquet(world.folder / "texts/viu.parquet").select("id", "text").iter_rows())
    tubc = pl.read_parquet(world.folder / "texts/tubc-train.parquet")
    for row in rows_of(world, name="loo-cot"):
        assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant"] * 3 + ["user"]
        texts = [words_of([turn]) for turn in row["prompt"]]
        latest = world.interactions["item"][row["shown"][-1]]
        assert row["images"] == [f"images/{latest}.png", f"images/{row['item']}.png"]
        assert "What is in the image" in texts[0] and texts[1] == viu[latest]
        assert f"Visual summary: {viu[latest]}" in texts[2]
        last = tubc.filter(pl.col("user") == row["user"])[-1]
        assert texts[5] == last["text"][0] and f"Preference: {texts[5]}" in texts[6]
        # The step's prompt is the one whose answer stands there: same hash as when it was asked.
        assert texts[4].startswith("Please summarize the user's multimodal summaries sequence")


def test_the_candidates_of_a_target_share_all_but_the_end(world):
    for form in ("plain", "cot"):
        build_instructions(InstructionOptions(world.folder, form=form, negatives=4, history=3))
        rows = rows_of(world, name=f"loo-{form}")
        for start in range(0, len(rows), 5):
            group = rows[start : start + 5]
            assert len({json.dumps(row["prompt"][:-1]) for row in group}) == 1
            heads = {row["prompt"][-1]["content"][0]["text"].split("Target item: ")[0] for row in group}
            assert len(heads) == 1


def test_steps_about_the_target_come_after_what_is_shared(world):
    build_instructions(InstructionOptions(world.folder, form="cot", cot_about="target"))
    for row in rows_of(world, name="loo-cot"):
        assert row["images"] == [f"images/{row['item']}.png"] * 2
        assert words_of(row["prompt"][:1]).startswith("Please summarize the user's multimodal summaries")
        assert "What is in the image" in words_of(row["prompt"][2:3])


@pytest.mark.parametrize("how", ["summary", "title", "image", "image+title"])
def test_listed_history(world, how):
    build_instructions(InstructionOptions(world.folder, history=3, history_as=how, preference="none"))
    for row in rows_of(world):
        items = [world.interactions["item"][number] for number in row["shown"]]
        assert len(items) == 3 and row["shown"][-1] == row["target_row"] - 1
        pictures = [f"images/{item}.png" for item in items] if how.startswith("image") else []
        assert row["images"] == [*pictures, f"images/{row['item']}.png"]
        assert sum(p["type"] == "image" for p in row["prompt"][0]["content"]) == len(row["images"])


def test_a_template_may_put_the_target_first(world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mllm_srec.question.txt").write_text("{target} after {history}? Yes or no.")
    options = InstructionOptions(
        world.folder, history=2, history_as="image", preference="none", templates=tmp_path / "mine"
    )
    build_instructions(options)
    for row in rows_of(world):
        items = [world.interactions["item"][number] for number in row["shown"]]
        assert row["images"] == [f"images/{item}.png" for item in [row["item"], *items]]


@pytest.mark.parametrize(("image", "text"), [(True, False), (False, True)])
def test_one_modality_of_the_target(world, image, text):
    build_instructions(InstructionOptions(world.folder, target_image=image, target_text=text))
    for row in rows_of(world):
        assert bool(row["images"]) == image
        assert ("Made to last." in words_of(row["prompt"]).split("Target item:")[1]) == text
    with pytest.raises(DataError, match="nothing of the target"):
        build_instructions(InstructionOptions(world.folder, target_image=False, target_text=False))


@pytest.mark.parametrize("limit", [0, 1, 7, 2000])
def test_the_text_of_the_target_is_cut_at_its_limit_but_not_the_title(world, limit):
    build_instructions(InstructionOptions(world.folder, form="cot", text_limit=limit))
    facts = {row["item"]: row for row in world.items.to_dicts()}
    for row in rows_of(world, name="loo-cot"):
        fact = facts[row["item"]]
        told = row["prompt"][-1]["content"][0]["text"].rstrip().split("Target item: ")[1]
        assert told.startswith(fact["title"]) and all(name in told for name in fact["categories"])
        whole = len(fact["text"]) <= limit
        assert (fact["text"] in told) == whole
        assert whole or len(told) <= len(f"{fact['title']}. {', '.join(fact['categories'])}. .") + limit


def test_training_targets_follow_a_summary_and_are_the_latest(world):
    build_instructions(InstructionOptions(world.folder, targets_per_user=2, negatives=0))
    for row in rows_of(world):
        place = [
            r for r in range(len(world.interactions)) if world.interactions["user"][r] == row["user"]
        ].index(row["target_row"])
        assert place in (3, 6) and len(row["shown"]) == place
    build_instructions(
        InstructionOptions(world.folder, targets_per_user=0, negatives=0, preference="none", name="all")
    )
    assert len(rows_of(world, name="all")) == 12 * 6


def test_negatives_are_training_items_that_the_user_never_touched_in_training(tmp_path):
    dataset = make_dataset(tmp_path / "d", interactions=700)
    for method in ("loo", "random"):
        split = split_of(dataset, method)
        train = split.scan("train").collect()
        touched = {user: set(items) for user, items in train.group_by("user").agg("item").iter_rows()}
        for sampling in ("uniform", "in_time"):
            options = InstructionOptions(
                dataset.folder, split=method, preference="none", negatives=7, targets_per_user=0,
                negative_sampling=sampling, parts=("train",), name=f"{method}-{sampling}",
            )  # fmt: skip
            build_instructions(options)
            rows = pl.DataFrame(
                pl.read_parquet(dataset.folder / f"instructions/{method}-{sampling}/train.parquet")
            )
            negatives = rows.filter(pl.col("label") == 0)
            assert not any(
                item in touched[user] for user, item in negatives.select("user", "item").iter_rows()
            )
            assert set(negatives["item"]) <= set(train["item"])
            assert rows.select("user", "target_row", "item").is_unique().all()
            if sampling == "in_time":
                first = dict(train.group_by("item").agg(pl.col("timestamp").min()).iter_rows())
                times = dataset.interactions["timestamp"]
                assert all(
                    first[item] <= times[row]
                    for item, row in negatives.select("item", "target_row").iter_rows()
                )


def test_negatives_depend_on_the_seed_and_the_user_alone(world, tmp_path):
    def pairs(name, **options):
        build_instructions(
            InstructionOptions(world.folder, name=name, preference="none", parts=("train",), **options)
        )
        return [(row["user"], row["item"]) for row in rows_of(world, name=name)]

    everyone = pairs("everyone")
    assert pairs("again") == everyone
    assert pairs("few", limit=3) == everyone[:6]
    assert pairs("other", seed=7) != everyone


def test_when_few_items_are_left_all_of_them_are_drawn(tmp_path):
    world = write_world(tmp_path / "world", users=3, length=5)
    split = split_of(world)
    sampler = TrainingNegatives(split, "uniform", 0)
    histories = Histories(split, "train")
    pool = {int(code) for user in range(3) for code in histories.history(user).items}
    touched = np.unique(histories.history(0).items)
    drawn = sampler.draw(0, histories.targets(0)[-1], touched, 1000)
    assert sorted(drawn) == sorted(pool - set(touched.tolist()))


def test_candidates_of_a_file_become_rows(world):
    split = Split.open(world.folder / "splits" / "loo")
    make_candidates(split, CandidateOptions(split.folder, negatives=4))
    build_instructions(InstructionOptions(world.folder, parts=("valid",), candidates="1+4-uniform-seed42"))
    rows = rows_of(world, "valid", "loo-plain-valid")
    expected = pl.read_parquet(split.folder / "candidates/1+4-uniform-seed42/valid.parquet")
    key = ["user", "target", "item", "label"]
    assert sorted(tuple(row[k] for k in key) for row in rows) == sorted(expected.select(key).rows())
    manifest = json.loads((world.folder / "instructions/loo-plain-valid/manifest.json").read_text())
    assert manifest["protocols"] == {"valid": "loo/1+4-uniform-seed42/valid"}
    with pytest.raises(DataError, match="does not exist"):
        build_instructions(InstructionOptions(world.folder, parts=("valid",), candidates="1+9", name="x"))
    path = split.folder / "candidates/1+4-uniform-seed42/valid.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="not the file that manifest"):
        build_instructions(
            InstructionOptions(world.folder, parts=("valid",), candidates="1+4-uniform-seed42", name="y")
        )


def test_summaries_of_another_part_or_split_are_refused(world):
    texts = world.folder / "texts"
    kept = (texts / "tubc-train.parquet").read_bytes()
    (texts / "tubc-train.parquet").write_bytes((texts / "tubc-test.parquet").read_bytes())
    with pytest.raises(DataError, match="another part's summaries"):
        build_instructions(InstructionOptions(world.folder))
    (texts / "tubc-train.parquet").write_bytes(kept)
    split_of(world, "users")
    with pytest.raises(DataError, match="another split"):
        build_instructions(InstructionOptions(world.folder, split="users"))
    (texts / "tubc-train.parquet").unlink()
    with pytest.raises(DataError, match="--parts train"):
        build_instructions(InstructionOptions(world.folder))


def test_a_broken_image_is_left_out_and_named(world, capsys):
    item = world.interactions.filter(pl.col("user") == "user0")["item"].to_list()[6]
    (world.folder / "images" / f"{item}.png").write_bytes(b"no image")
    build_instructions(InstructionOptions(world.folder))
    positive = next(row for row in rows_of(world) if row["item"] == item)
    assert positive["images"] == [] and len(positive["prompt"][0]["content"]) == 1
    manifest = json.loads((world.folder / "instructions/loo-plain/manifest.json").read_text())
    assert list(manifest["unusable_images"]) == [item]
    assert item in capsys.readouterr().out


def test_manifest_and_report_of_the_command(world, capsys):
    main(["build", "instructions", str(world.folder), "--form", "cot", "--negatives", "2"])
    out = capsys.readouterr().out
    assert "36 rows of 12 users, 12 yes and 24 no" in out
    manifest = json.loads((world.folder / "instructions/loo-cot/manifest.json").read_text())
    assert manifest["counts"]["train"]["rows"] == 36 and manifest["protocols"] == {
        "train": "loo",
        "valid": "loo",
    }
    assert set(manifest["texts"]) == {"viu", "imsg", "tubc-train", "tubc-valid"}
    assert all(len(each["sha256"]) == 16 for each in manifest["templates"].values())
    with pytest.raises(SystemExit):
        main(["build", "instructions", str(world.folder), "--form", "cot"])
    main(["build", "instructions", str(world.folder), "--dry-run"])
    assert "--- completion: Yes." in capsys.readouterr().out
    assert not (world.folder / "instructions/loo-plain").exists()


def test_the_same_command_writes_the_same_bytes(world):
    build_instructions(InstructionOptions(world.folder, name="one"))
    build_instructions(InstructionOptions(world.folder, name="two"))
    for part in ("train", "valid"):
        one, two = (world.folder / "instructions" / name / f"{part}.parquet" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


class LongWords:
    """Counts words in place of tokens; what the processor of a model does in `test_chain`."""

    special_tokens = ()

    def of(self, identifier, chat):
        return len(words_of(chat.messages).split())


@pytest.mark.parametrize("budget", [70, 90, 10_000])
def test_all_candidates_of_a_target_list_the_same_history(world, monkeypatch, budget):
    from recllm.builders import instructions

    monkeypatch.setattr(instructions, "PromptLength", lambda *arguments: LongWords())
    options = InstructionOptions(
        world.folder, history=6, negatives=3, preference="none", processor="x", max_prompt_tokens=budget,
        name=str(budget), parts=("train",),
    )  # fmt: skip
    build_instructions(options)
    rows = rows_of(world, name=str(budget))
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        assert len({tuple(row["shown"]) for row in group}) == 1
        assert max(len(words_of(row["prompt"]).split()) for row in group) <= budget
        shown = group[0]["shown"]
        assert shown == list(range(group[0]["target_row"] - len(shown), group[0]["target_row"]))
        if len(shown) < 6:  # one more would have been too long for one of them
            line = 12  # words of a summary line: its number and the stand-in's answer
            assert max(len(words_of(row["prompt"]).split()) for row in group) + line > budget
    counts = json.loads((world.folder / f"instructions/{budget}/manifest.json").read_text())["counts"]
    assert (counts["train"].get("history_items_left_out", 0) > 0) == (budget < 10_000)


def test_steps_that_no_longer_match_their_prompts_are_refused(world, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("tubc", "imsg", "viu"):
        text = {"tubc": "Sum up.{previous}{items}", "imsg": "Join {visual_summary}.", "viu": "What?"}[name]
        (tmp_path / "mine" / f"mllm_srec.{name}.txt").write_text(text)
        with pytest.raises(DataError, match="answers another prompt"):
            build_instructions(
                InstructionOptions(world.folder, form="cot", templates=tmp_path / "mine", name=name)
            )
        (tmp_path / "mine" / f"mllm_srec.{name}.txt").unlink()


def test_what_is_missing_is_counted(world, capsys):
    summarize_users(UserOptions(world.folder, "rule", parts=("train", "valid"), limit=4, overwrite=True))
    build_instructions(InstructionOptions(world.folder))
    counts = json.loads((world.folder / "instructions/loo-plain/manifest.json").read_text())["counts"]
    assert counts["train"]["users_without_summary"] == 8 and counts["train"]["rows"] == 8
    assert counts["valid"]["rows_without_summary"] == 16 and counts["valid"]["rows"] == 24
    assert "rows without summary: 16" in capsys.readouterr().out


def test_an_empty_answer_makes_no_turn(world, backend, monkeypatch):
    from recllm.mllm.chat import Result

    def some(requests, decoding):
        words = ("likes mugs", " ")
        yield [Result(key, words[place % 2], 1, 1, "stop") for place, (key, _) in enumerate(requests)]

    monkeypatch.setattr(backend, "generate", some)
    backend.identity["model"] = "mute"
    summarize_users(UserOptions(world.folder, "mute", parts=("train", "valid"), overwrite=True))
    build_instructions(InstructionOptions(world.folder, form="cot"))
    _, metadata = read_texts(world.folder / "texts" / "tubc-valid.parquet")
    assert metadata["unusable_count"] > 0
    rows = [*rows_of(world, name="loo-cot"), *rows_of(world, "valid", name="loo-cot")]
    assert rows
    for row in rows:
        parts = [part for turn in row["prompt"] for part in turn["content"]]
        assert all(part["text"].strip() for part in parts if part["type"] == "text")
        roles = [turn["role"] for turn in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_parts_are_not_deleted_by_writing_others(world):
    build_instructions(InstructionOptions(world.folder))
    with pytest.raises(DataError, match="also has valid"):
        build_instructions(InstructionOptions(world.folder, parts=("train",), overwrite=True))
    assert len(rows_of(world, "valid")) == 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parts": ()}, "--parts"),
        ({"parts": ("train", "train")}, "--parts"),
        ({"limit": 0}, "--limit 0"),
        ({"negatives": -1}, "--negatives -1"),
        ({"preference": "../x"}, "plain word"),
        ({"name": "a/b"}, "plain word"),
        ({"max_prompt_tokens": 5}, "--processor"),
        ({"candidates": "1+4", "parts": ("train",)}, "valid and test"),
    ],
)
def test_wrong_options_are_named(world, change, words):
    with pytest.raises(DataError, match=words):
        build_instructions(InstructionOptions(world.folder, **change))

"""MMSRARec's instruction rows: what they say, their four tasks, and that nothing of the future is in them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.builders import tasks
from recllm.builders.catalog import Catalog
from recllm.builders.histories import History
from recllm.builders.instructions import build_instructions
from recllm.builders.keyword_chats import KeywordComposer
from recllm.builders.options import InstructionOptions
from recllm.builders.tasks import TASKS, recurring, shares_of
from recllm.cli import main
from recllm.data.candidates import CandidateOptions, make_candidates
from recllm.data.instructions import open_part, rows_of_task
from recllm.data.keywords import ItemKeywords
from recllm.errors import DataError
from recllm.prompts import TEMPLATES
from tests.builders.keyword_worlds import add_keywords, add_neighbors, words_of_item
from tests.builders.test_instructions import LongWords
from tests.builders.test_leaks import HOSTILE, TEST, VALID
from tests.builders.worlds import split_of, words_of, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world whose held-out items carry marks in all that is known of them, keywords included."""
    dataset = write_world(tmp_path_factory.mktemp("keywords") / "world", mark={"valid": VALID, "test": TEST})
    split = split_of(dataset)
    make_candidates(split, CandidateOptions(split.folder, negatives=6))
    add_keywords(dataset)
    add_neighbors(split)
    return dataset


@pytest.fixture
def build(world, request):
    """Builds rows in a folder of the test's own, and returns a part as dictionaries."""
    number = 0

    def make(part="train", **options):
        nonlocal number
        number += 1
        name = re.sub(r"\W", "_", f"{request.node.name}-{number}")
        build_instructions(
            InstructionOptions(world.folder, form="mmsrarec", parts=(part,), name=name, **options)
        )
        return pl.read_parquet(world.folder / "instructions" / name / f"{part}.parquet").to_dicts()

    return make


def items_of(world, rows):
    return world.interactions["item"].gather(rows).to_list()


def told(items):
    return [", ".join(words_of_item(item)) for item in items]


def section(text, title):
    """The numbered lines after a title."""
    lines = text.split("\n")
    place = lines.index(f"{title}:")
    found = []
    for line in lines[place + 1 :]:
        if not re.match(r"\d+\. ", line):
            break
        found.append(line.split(". ", 1)[1])
    return found


def of_task(rows, task):
    return [row for row in rows if row["task"] == task]


def test_a_question_lists_keywords_of_history_and_neighbors_and_shows_the_target(world, build):
    rows = of_task(build(targets_per_user=0), "yes_no")
    assert rows[0]["prompt"][0]["role"] == "user" and len(rows[0]["prompt"]) == 1
    facts = {row["item"]: row for row in world.items.to_dicts()}
    for row in rows:
        text = words_of(row["prompt"])
        shown = row["shown"]
        number = (
            world.interactions.with_row_index("row").filter(pl.col("user") == row["user"])["row"].to_list()
        )
        before = [each for each in number if each < row["target_row"]]
        assert shown == before[-5:]
        assert section(text, "Recent items of the user, oldest first") == told(items_of(world, shown))
        if row["retrieved"]:
            nearest = items_of(world, sorted(row["retrieved"], reverse=True))
            assert section(text, "Next items of similar users") == told(nearest)
        else:
            assert "similar users" not in text
        target = text.split("Target item: ")[1]
        assert (
            target.startswith(f"{row['item']}. {facts[row['item']]['title']}.") and "Made to last." in target
        )
        assert row["images"] == [f"images/{row['item']}.png"]
        assert words_of(row["completion"]) == ("Yes." if row["label"] else "No.")
    assert sum(len(row["retrieved"]) == 2 for row in rows) > len(rows) / 2
    first = [row for row in rows if row["user"] == "user0"]  # nobody is earlier
    assert first and not any(row["retrieved"] for row in first)


def test_the_four_tasks_and_their_answers(world, build):
    rows = build(targets_per_user=3, choices=4)
    assert {row["task"] for row in rows} == set(TASKS)
    assert len({row["id"] for row in rows}) == len(rows)
    targets = {(row["user"], row["target_row"]) for row in rows}
    for task in TASKS[1:]:
        found = of_task(rows, task)
        assert len({(row["user"], row["target_row"]) for row in found}) == len(found)
        assert {row["label"] for row in found} == {1} and not any(row["images"] for row in found)
        if task != "summarize":
            assert {(row["user"], row["target_row"]) for row in found} == targets
    for row in of_task(rows, "next_keywords"):
        assert words_of(row["completion"]) == ", ".join(words_of_item(row["target"]))
        assert "its keywords alone" in words_of(row["prompt"])
    places = []
    titles = dict(world.items.select("title", "item").iter_rows())
    for row in of_task(rows, "choose"):
        candidates = section(words_of(row["prompt"]), "Candidates")
        assert len(set(candidates)) == 4
        place = int(words_of(row["completion"]))
        title, words = candidates[place - 1].split(": ")
        assert titles[title] == row["target"] and words == ", ".join(words_of_item(row["target"]))
        touched = set(world.interactions.filter(pl.col("user") == row["user"])["item"])
        others = {titles[line.split(": ")[0]] for line in candidates} - {row["target"]}
        assert not others & touched
        places.append(place)
    assert len(set(places)) == 4  # the target is not always at the same place
    for row in of_task(rows, "summarize"):
        users = world.interactions.with_row_index("row").filter(pl.col("user") == row["user"])
        known = [item for item, at in users.select("item", "row").iter_rows() if at < row["target_row"]]
        counts = {}
        for item in known:
            for word in words_of_item(item):
                counts[word] = counts.get(word, 0) + 1
        answer = words_of(row["completion"]).split(", ")
        assert answer and all(counts[word] > 1 for word in answer)
        assert [counts[word] for word in answer] == sorted((counts[word] for word in answer), reverse=True)
        assert len(answer) == min(6, sum(count > 1 for count in counts.values()))
        assert not row["retrieved"] and "similar users" not in words_of(row["prompt"])


def test_recurring_keywords_are_ordered_by_count_then_recency():
    assert recurring([["a", "b"], ["B", "c"], ["c", "d", "A"]]) == ["c", "A", "B"]
    assert recurring([["a"], ["b"]]) == [] and recurring([]) == []
    assert recurring([["x"] * 3, ["y"]]) == []  # one item says it, however often
    assert recurring([[str(n) for n in range(9)]] * 2, most=3) == ["0", "1", "2"]


@pytest.mark.parametrize("part", ["train", "valid"])
def test_no_mark_reaches_what_is_built_before_it(world, build, part):
    rows = build(part, targets_per_user=0, negatives=6)
    text = str(rows)
    assert TEST not in text and (VALID in text) == (part == "valid")
    assert {row["task"] for row in rows} == set(TASKS)
    times = world.timestamps
    users = world.interactions["user"]
    for row in rows:
        assert all(times[each] < times[row["target_row"]] for each in row["shown"] + row["retrieved"])
        assert all(users[each] == row["user"] for each in row["shown"])
        assert all(users[each] != row["user"] for each in row["retrieved"])
        if part == "valid" and row["task"] == "yes_no":  # the label alone tells the positive
            assert VALID not in words_of(row["prompt"]).split("Target item:")[0]


def test_the_marks_of_the_test_part_are_in_the_test_part(build):
    assert TEST in str(build("test")) and VALID in str(build("test"))


def held_out_of_another(world, row):
    return (row // 9 + 1) * 9 % 108 + 7  # the next user's validation interaction


def own(world, row):
    return row - 1


def later(world, row):
    return 11 * 9  # the last user's first interaction, or the user's own


@pytest.mark.parametrize("planted", [held_out_of_another, own, later])
def test_the_guard_stops_neighbors_that_must_not_be_told(world, build, monkeypatch, planted):
    about = KeywordComposer.about

    def with_planted(self, history, retrieved):
        return about(self, history, [*retrieved, np.array([planted(world, int(history.rows[-1]) + 1)])])

    monkeypatch.setattr(KeywordComposer, "about", with_planted)
    with pytest.raises(RuntimeError, match="a neighbor's interaction that must not be known"):
        build()


def test_shares_are_respected_and_do_not_touch_other_tasks(build):
    whole = build(targets_per_user=0)
    some = build(targets_per_user=0, tasks=("yes_no", "next_keywords=0.5", "summarize=0.1"))
    targets = len(of_task(whole, "next_keywords"))
    assert targets == 12 * 6
    assert 0.3 < len(of_task(some, "next_keywords")) / targets < 0.7
    assert len(of_task(some, "summarize")) / targets < 0.25
    assert not of_task(some, "choose")
    assert of_task(some, "yes_no") == of_task(whole, "yes_no")
    everything = {row["id"]: row for row in whole}
    assert all(everything[row["id"]] == row for row in some)
    assert build(targets_per_user=0, tasks=("yes_no", "next_keywords=0.5", "summarize=0.1")) == some
    again = build(targets_per_user=0, tasks=("next_keywords=0.5",), seed=1)
    assert {row["task"] for row in again} == {"next_keywords"}
    assert {row["id"] for row in again} != {row["id"] for row in of_task(some, "next_keywords")}


def test_held_out_parts_ask_yes_or_no_of_every_target(build):
    rows = build("valid", tasks=("choose",), candidates="1+6-uniform-seed42")
    assert len(of_task(rows, "yes_no")) == 12 * 7
    chosen = of_task(rows, "choose")
    assert len(chosen) == 12
    for row in chosen:
        lists = {each["item"] for each in of_task(rows, "yes_no") if each["user"] == row["user"]}
        assert len(section(words_of(row["prompt"]), "Candidates")) == 5 and row["target"] in lists
    assert {row["task"] for row in build(tasks=("choose",))} == {"choose"}


def test_candidates_share_all_but_the_end(build):
    rows = of_task(build(negatives=3), "yes_no")
    for start in range(0, len(rows), 4):
        group = rows[start : start + 4]
        heads = {words_of(row["prompt"]).split("Target item: ")[0] for row in group}
        assert len(heads) == 1 and len({row["target_row"] for row in group}) == 1


def test_the_ablations(world, build):
    without = build(neighbors="none")
    assert not any(row["retrieved"] for row in without) and "similar users" not in str(without)
    titles = build(keywords="none", tasks=("yes_no", "next_keywords", "choose"))
    assert "word common" not in str(titles) and "From the titles below" in str(titles)
    known = dict(world.items.select("item", "title").iter_rows())
    for row in of_task(titles, "next_keywords"):
        assert words_of(row["completion"]) == known[row["target"]]
        text = words_of(row["prompt"])
        assert section(text, "Recent items of the user, oldest first") == [
            known[item] for item in items_of(world, row["shown"])
        ]
    split = split_of_world(world)
    add_neighbors(split, k=1, name="gru4rec")
    other = build(neighbors="gru4rec")
    assert max(len(row["retrieved"]) for row in other) == 1
    single = build(tasks=("yes_no",))
    assert {row["task"] for row in single} == {"yes_no"}
    plain = build(target_image=False, target_id=False, history=2)
    assert not any(row["images"] for row in plain) and max(len(row["shown"]) for row in plain) == 2
    assert "Target item: Thing" in str(plain)


def split_of_world(world):
    from recllm.data.splits import Split

    return Split.open(world.folder / "splits" / "loo", dataset=world)


def test_several_next_items_of_a_neighbor_are_one_line(world, build):
    add_neighbors(split_of_world(world), name="longer", next_items=2)
    row = next(row for row in of_task(build(neighbors="longer"), "yes_no") if len(row["retrieved"]) == 4)
    lines = section(words_of(row["prompt"]), "Next items of similar users")
    of_nearest = told(items_of(world, sorted(row["retrieved"])[-2:]))
    assert lines[0] == "; ".join(of_nearest) and len(lines) == 2


def test_neighbors_of_any_time_are_told_if_the_file_says_so(world, build):
    add_neighbors(split_of_world(world), name="anytime", time="any")
    rows = build(neighbors="anytime")
    times = world.timestamps
    assert any(times[each] > times[row["target_row"]] for row in rows for each in row["retrieved"])
    assert all(row["retrieved"] for row in of_task(rows, "yes_no"))
    training = set(split_of_world(world).rows("train").tolist())
    assert all(each in training for row in rows for each in row["retrieved"])


def test_the_manifest_says_what_the_rows_were_made_from(world, build, capsys):
    build(tasks=("yes_no", "choose=0.5"))
    assert " choose" in capsys.readouterr().out
    folder = sorted((world.folder / "instructions").glob("test_the_manifest*"))[-1]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["neighbors"]["ranker"] == "by hand" and manifest["neighbors"]["name"] == "sasrec"
    assert manifest["texts"].keys() == {"keywords"}
    assert manifest["settings"]["tasks"] == ["yes_no", "choose=0.5"] and manifest["settings"]["history"] == 5
    assert "preference" not in manifest["settings"]
    counts = manifest["counts"]["train"]
    assert counts["rows"] == counts["rows_yes_no"] + counts["rows_choose"]
    assert open_part(folder, "train").form == "mmsrarec"


def test_the_budget_holds_for_every_task(world, monkeypatch):
    from recllm.builders import instructions

    monkeypatch.setattr(instructions, "PromptLength", lambda *arguments: LongWords())
    for budget in (90, 110, 10_000):
        options = InstructionOptions(
            world.folder, form="mmsrarec", processor="x", max_prompt_tokens=budget, name=f"budget{budget}",
            parts=("train",),
        )  # fmt: skip
        build_instructions(options)
        rows = pl.read_parquet(world.folder / f"instructions/budget{budget}/train.parquet").to_dicts()
        assert max(len(words_of(row["prompt"]).split()) for row in rows) <= budget
        for before, row in pairwise(rows):
            if before["target_row"] == row["target_row"]:
                assert before["shown"] == row["shown"]
        counts = json.loads((world.folder / f"instructions/budget{budget}/manifest.json").read_text())[
            "counts"
        ]
        assert (counts["train"].get("history_items_left_out", 0) > 0) == (budget < 10_000)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(HOSTILE, min_size=1, max_size=4), title=HOSTILE)
def test_hostile_keywords_change_neither_turns_nor_image_slots(words, title):
    class Items(Catalog):
        def __init__(self):
            self.ids, self.special_tokens = [title, "b"], ("<|secret|>",)
            self._titles, self._texts = pl.Series([title, "B"]), pl.Series(["", ""])
            self._categories, self._images = pl.Series([["c"], ["c"]]), pl.Series([["a.png"], ["b.png"]])
            self.described = self._described

    options = InstructionOptions(None, form="mmsrarec", history=5)
    keywords = ItemKeywords("k", "", [words, [*words, "<|secret|>", "b\n2. c"]])
    composer = KeywordComposer(
        Items(), TEMPLATES, options, keywords, None, lambda code: True, np.array([0, 1, 0])
    )
    history = History(0, np.array([0, 1]), np.array([0, 1]))
    chats = composer.about(history, [np.array([2])])
    found = [chats.chat(0, 2), chats.next_keywords(2), chats.choose([0, 1], 2), chats.summarize(2)]
    for chat in found:
        (turn,) = chat.messages
        slots = [part for part in turn["content"] if part["type"] == "image"]
        assert len(slots) == len(chat.images) == (chat is found[0])
        text = words_of(chat.messages)
        assert "<|" not in text.replace("< |", "") and "\ufffc" not in text and "<image>" not in text
        lists = "Recent items of the user, oldest first"
        assert len(section(text, lists)) == 2  # a line break in a keyword opens no line
    for answer in (composer.answer(0), composer.answer(1), chats.preference()):
        assert "<|" not in answer.replace("< |", "") and "\n" not in answer and "\ufffc" not in answer


def test_items_without_keywords_are_told_by_their_title(world, build, capsys):
    add_keywords(world, lambda item: [] if item.endswith("7") else words_of_item(item), name="some")
    rows = build(keywords="some")
    assert "items have no keywords" in capsys.readouterr().out
    titles = dict(world.items.select("item", "title").iter_rows())
    lines = [
        (item, line)
        for row in rows
        for item, line in zip(
            items_of(world, row["shown"]),
            section(words_of(row["prompt"]), "Recent items of the user, oldest first"),
            strict=True,
        )
    ]
    assert any(item.endswith("7") for item, _ in lines)
    for item, line in lines:
        assert line == (titles[item] if item.endswith("7") else ", ".join(words_of_item(item)))
    without = {row["target"] for row in of_task(rows, "yes_no")} - {
        row["target"] for row in of_task(rows, "next_keywords")
    }
    assert all(item.endswith("7") for item in without)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ()}, "expected one or more"),
        ({"tasks": ("yesno",)}, "nearest is 'yes_no'"),
        ({"tasks": ("yes_no=0",)}, "above 0"),
        ({"tasks": ("choose=2",)}, "at most 1"),
        ({"tasks": ("choose=x",)}, "NAME=SHARE"),
        ({"tasks": ("choose=nan",)}, "NAME=SHARE"),
        ({"tasks": ("choose", "choose=0.5")}, "twice"),
        ({"choices": 1}, "--choices 1"),
        ({"choices": 7, "tasks": ("yes_no",)}, "without the task choose"),
        ({"keywords": "none"}, "nothing to summarize"),
        ({"keywords": "others"}, "does not exist"),
        ({"keywords": "../x"}, "plain word"),
        ({"neighbors": "others"}, "recllm retrieve neighbors"),
        ({"preference": "x"}, "--preference has no effect"),
        ({"profile": False, "history_as": "title"}, "--history-as, --profile have no effect"),
        (
            {"form": "plain", "tasks": ("yes_no",), "preference": "none"},
            "--tasks has no effect with --form plain",
        ),
        ({"form": "cot", "neighbors": "none"}, "--neighbors has no effect with --form cot"),
        ({"history": -1}, "--history -1"),
        ({"history": 0}, "without a history"),
    ],
)
def test_options_that_cannot_work_are_named(world, change, words):
    with pytest.raises(DataError, match=words):
        build_instructions(InstructionOptions(world.folder, name="wrong", **{"form": "mmsrarec", **change}))
    assert not (world.folder / "instructions" / "wrong").exists()


def test_neighbors_of_fewer_targets_than_asked_are_refused(world):
    path = world.folder / "neighbors" / "sasrec.parquet"
    metadata = pl.read_parquet_metadata(path)
    facts = json.loads(metadata["recllm.made"])
    changed = {**metadata, "recllm.made": json.dumps({**facts, "targets_per_user": 2})}
    pl.read_parquet(path).write_parquet(path.with_name("two.parquet"), metadata=changed)
    options = InstructionOptions(
        world.folder, form="mmsrarec", neighbors="two", name="two", targets_per_user=2
    )
    build_instructions(options)
    for count in (0, 3):
        with pytest.raises(DataError, match="latest 2 training targets"):
            build_instructions(replace(options, targets_per_user=count, overwrite=True))


def test_files_of_keywords_are_checked(world, tmp_path):
    path = world.folder / "texts" / "bad.parquet"
    good = pl.read_parquet(world.folder / "texts" / "keywords.parquet")
    metadata = pl.read_parquet_metadata(world.folder / "texts" / "keywords.parquet")
    for table, meta, words in (
        (good.drop("keywords"), metadata, "not a file of keywords"),
        (good, {}, "does not state the hash"),
        (good, {"recllm.keywords": "{"}, "not JSON"),
        (good, {"recllm.keywords": json.dumps({"data_hash": "0" * 16})}, "another state of the dataset"),
        (pl.concat([good, good]), metadata, "two lists"),
        (good.with_columns(id=pl.col("id") + "?"), metadata, "none of its ids"),
    ):
        table.write_parquet(path, metadata=meta)
        with pytest.raises(DataError, match=words):
            ItemKeywords.open(world, "bad")
    path.unlink()


def test_rows_of_files_without_the_column_ask_for_yes_or_no():
    old = pl.LazyFrame({"id": ["a"]})
    assert len(rows_of_task(old).collect()) == 1 and len(rows_of_task(old, "choose").collect()) == 0


def test_the_command(world, capsys):
    words = [
        "build",
        "instructions",
        str(world.folder),
        "--form",
        "mmsrarec",
        "--tasks",
        "yes_no",
        "choose=0.5",
    ]
    main([*words, "--dry-run"])
    out = capsys.readouterr().out
    assert "yes_no, label 1" in out and "similar users" not in out  # the first user has no earlier neighbor
    main([*words, "--candidates", "1+6-uniform-seed42"])
    assert (world.folder / "instructions" / "loo-mmsrarec" / "valid.parquet").exists()


def test_shares_are_read_in_the_order_of_the_tasks():
    assert list(shares_of(("summarize=0.25", "yes_no")).items()) == [("yes_no", 1.0), ("summarize", 0.25)]
    drawn = [tasks.is_asked("choose", 0.3, 0, f"u{n}", "i", n) for n in range(4000)]
    assert abs(np.mean(drawn) - 0.3) < 0.03

"""Texts about items and users: what is asked, what is written, what is skipped and named."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest

from recllm.builders.catalog import profiles_of
from recllm.builders.items import keyword_table, summarize_items
from recllm.builders.options import ItemOptions, UserOptions
from recllm.builders.users import summarize_users
from recllm.cli import main
from recllm.data.dataset import write_dataset
from recllm.data.texts import read_texts
from recllm.errors import DataError
from recllm.mllm.chat import Result
from recllm.prompts.mllm_srec import TUBC
from tests.builders.worlds import split_of, words_of, write_world
from tests.conftest import make_dataset


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path / "world")


def test_viu_then_imsg(world, backend, capsys):
    summarize_items(ItemOptions(world.folder, "rule"))
    viu, metadata = read_texts(world.folder / "texts" / "viu.parquet")
    imsg, _ = read_texts(world.folder / "texts" / "imsg.parquet")
    assert viu["id"].to_list() == imsg["id"].to_list() == world.items["item"].to_list()
    assert metadata["model"] == {"model": "rule"} and metadata["data_hash"] == world.data_hash
    looks = [request for request in backend.asked if request.images]
    assert {request.images[0].name for request in looks} == {f"{item}.png" for item in viu["id"]}
    assert all(request.messages[0]["content"][0]["type"] == "image" for request in looks)
    answers = dict(viu.select("id", "text").iter_rows())
    combined = [request for request in backend.asked if not request.images]
    assert combined and all(f"Visual summary: {answers[r.id]}" in words_of(r.messages) for r in combined)
    assert "different" in capsys.readouterr().out


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(world, backend):
    summarize_items(ItemOptions(world.folder, "rule"))
    path = world.folder / "texts" / "imsg.parquet"
    before, asked = path.read_bytes(), len(backend.asked)
    with pytest.raises(DataError, match="overwrite"):
        summarize_items(ItemOptions(world.folder, "rule"))
    summarize_items(ItemOptions(world.folder, "rule", overwrite=True))
    assert path.read_bytes() == before and len(backend.asked) == asked


def test_items_without_image_or_with_a_broken_one(tmp_path, backend, capsys):
    world = write_world(tmp_path / "world", users=2)
    items = world.items.to_dicts()
    items[0]["images"] = []
    items[1] |= {"title": "", "text": "", "categories": [], "images": []}
    changed = write_dataset(
        tmp_path / "changed",
        items=pl.DataFrame(items, schema=world.items.schema),
        interactions=world.interactions,
        users=world.users,
        source={},
        stage=lambda folder: shutil.copytree(world.folder / "images", folder / "images"),
    )
    (changed.folder / "images" / f"{items[2]['item']}.png").unlink()
    (changed.folder / "images" / f"{items[2]['item']}.png").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="link"):
        summarize_items(ItemOptions(changed.folder, "rule"))
    (changed.folder / "images" / f"{items[2]['item']}.png").unlink()
    (changed.folder / "images" / f"{items[2]['item']}.png").write_bytes(b"")
    summarize_items(ItemOptions(changed.folder, "rule"))
    viu, metadata = read_texts(changed.folder / "texts" / "viu.parquet")
    imsg, _ = read_texts(changed.folder / "texts" / "imsg.parquet")
    assert items[0]["item"] not in viu["id"].to_list() and metadata["without_image"] == 2
    assert items[0]["item"] in imsg["id"].to_list() and items[1]["item"] not in imsg["id"].to_list()
    no_picture = next(r for r in backend.asked if r.id == items[0]["item"])
    assert "Visual summary" not in words_of(no_picture.messages)


def test_title_in_or_out(world, backend):
    summarize_items(ItemOptions(world.folder, "rule", system="vlm4rec"))
    assert not any("Thing" in words_of(request.messages) for request in backend.asked)
    summarize_items(ItemOptions(world.folder, "rule", system="vlm4rec", with_title=True))
    assert sum("Product title: Thing" in words_of(request.messages) for request in backend.asked) == 27
    assert {path.name for path in (world.folder / "texts").iterdir()} == {
        "grounding.parquet",
        "grounding-with-title.parquet",
    }


def test_keywords_of_image_and_text_are_asked_for_separately_and_parsed(world, backend):
    summarize_items(ItemOptions(world.folder, "rule", system="mmsrarec", limit=5))
    with_image = [request for request in backend.asked if request.images]
    without = [request for request in backend.asked if not request.images]
    assert len(with_image) == len(without) == 5
    assert all("Title" not in words_of(request.messages) for request in with_image)
    table = pl.read_parquet(world.folder / "texts" / "keywords.parquet")
    assert table["id"].to_list() == world.items["item"].to_list()[:5]
    metadata = pl.read_parquet_metadata(world.folder / "texts" / "keywords.parquet")["recllm.keywords"]
    assert json.loads(metadata)["dropped"].keys() <= {"repetitions", "sentences", "labels"}
    for row in table.iter_rows(named=True):
        assert row["keywords"][: len(row["image_keywords"])] == row["image_keywords"]
        assert {word.casefold() for word in row["keywords"]} == {
            word.casefold() for word in row["image_keywords"] + row["text_keywords"]
        }


def test_windows_follow_each_other_with_the_summary_of_the_one_before(world, backend):
    split_of(world)
    summarize_items(ItemOptions(world.folder, "rule"))
    backend.asked.clear()
    summarize_users(UserOptions(world.folder, "rule", parts=("train", "valid"), window=2, step=2))
    train, metadata = read_texts(world.folder / "texts" / "tubc-train.parquet")
    valid, _ = read_texts(world.folder / "texts" / "tubc-valid.parquet")
    assert metadata["part"] == "train" and metadata["window"] == 2
    summaries = dict(read_texts(world.folder / "texts" / "imsg.parquet")[0].select("id", "text").iter_rows())
    log = world.interactions
    asked = [words_of(request.messages) for request in backend.asked]
    for user in world.users["user"]:
        mine = train.filter(pl.col("user") == user)
        assert mine.select("begin", "end").rows() == [(0, 2), (2, 4), (4, 6)]
        known = valid.filter(pl.col("user") == user)
        assert known.select("begin", "end").rows() == [(0, 2), (2, 4), (4, 6), (6, 7)]
        assert known["text"].to_list()[:3] == mine["text"].to_list()
        items = log.filter(pl.col("user") == user)["item"].to_list()
        before = ""
        for begin, end, text in known.select("begin", "end", "text").iter_rows():
            lines = [f"{place}. {summaries[item]}" for place, item in enumerate(items[begin:end], 1)]
            previous = f"Previous preference: {before}\n" if before else ""
            prompt = TUBC.text.split("\n")[0] + "\n" + previous + "Sequence:\n" + "\n".join(lines)
            assert prompt in asked
            before = text
    # What both parts share was asked once.
    assert len(asked) == len(set(asked))


def test_only_the_latest_windows_where_histories_are_bounded(world, backend):
    split_of(world)
    summarize_items(ItemOptions(world.folder, "rule"))
    summarize_users(UserOptions(world.folder, "rule", parts=("valid",), window=2, step=2, max_history=4))
    valid, _ = read_texts(world.folder / "texts" / "tubc-valid.parquet")
    assert set(valid.select("begin", "end").rows()) == {(4, 6), (6, 7)}
    summarize_users(UserOptions(world.folder, "rule", parts=("valid",), max_history=1, overwrite=True))
    valid, _ = read_texts(world.folder / "texts" / "tubc-valid.parquet")
    assert set(valid.select("begin", "end").rows()) == {(6, 7)}


def test_preference_reads_training_items_only_unless_told_to_leak(world, backend):
    split_of(world)
    summarize_items(ItemOptions(world.folder, "rule", system="mllmrec"))
    backend.asked.clear()
    summarize_users(UserOptions(world.folder, "rule", system="mllmrec"))
    assert len(backend.asked) == 12
    assert not any("later" in words_of(r.messages) or "latest" in words_of(r.messages) for r in backend.asked)
    backend.asked.clear()
    summarize_users(UserOptions(world.folder, "rule", system="mllmrec", leak_all_interactions=True))
    assert all(
        "later title" in words_of(r.messages) and "latest title" in words_of(r.messages)
        for r in backend.asked
    )
    _, metadata = read_texts(world.folder / "texts" / "preference-leaky.parquet")
    assert metadata["leak"] is True


def test_a_preference_prompt_over_budget_loses_its_oldest_items_whole(world, backend):
    split_of(world)
    summarize_items(ItemOptions(world.folder, "rule", system="mllmrec"))
    backend.asked.clear()
    summarize_users(UserOptions(world.folder, "rule", system="mllmrec", max_prompt_tokens=100))
    _, metadata = read_texts(world.folder / "texts" / "preference.parquet")
    assert metadata["items_left_out"] > 0
    log = world.interactions
    for request in backend.asked:
        prompt = words_of(request.messages)
        assert len(prompt.split()) <= 100
        latest = log.filter(pl.col("user") == request.id)["item"].to_list()[-3]
        title = world.items.filter(pl.col("item") == latest)["title"][0]
        assert f"{title}. all, " in prompt
    with pytest.raises(DataError, match="user 'user0'"):
        summarize_users(
            UserOptions(world.folder, "rule", system="mllmrec", max_prompt_tokens=20, overwrite=True)
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 4}, "step 4"),
        ({"item_texts": "none"}, "none.parquet does not exist"),
        ({"split": "nothing"}, "nothing"),
        ({"tag": "a/b"}, "plain word"),
        ({"limit": 0}, "--limit 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"max_history": -1}, "--max-history -1"),
        ({"parts": ()}, "--parts"),
        ({"system": "mllmrec"}, "--system mllmrec"),
    ],
)
def test_wrong_options_are_named_before_a_model_is_loaded(world, change, words):
    split_of(world)
    with pytest.raises(DataError, match=words):
        summarize_users(UserOptions(world.folder, "no such model", **change))
    assert not (world.folder / "generations").exists()


def test_a_dry_run_prints_prompts_and_writes_nothing(world, backend, capsys):
    before = sorted(world.folder.rglob("*"))
    main(
        [
            "build",
            "items",
            str(world.folder),
            "--model",
            "rule",
            "--dry-run",
            "--price-in",
            "1",
            "--price-out",
            "2",
        ]
    )
    out = capsys.readouterr().out
    assert "What is in the image and describe its category" in out
    assert "viu: 51 requests, about 51 to do" in out and "imsg: 51 requests, about 46 to do" in out
    assert "Please combine visual summary" in out and "at the given prices" in out
    assert sorted(world.folder.rglob("*")) == before


def test_options_from_a_yaml_file_named_first(world, backend, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"dataset: {world.folder}\nmodel: rule\nsystem: vlm4rec\nlimit: 3\n")
    main(["build", "items", str(config)])
    assert len(pl.read_parquet(world.folder / "texts" / "grounding.parquet")) == 3
    config.write_text(f"dataset: {world.folder}\nmodell: rule\n")
    with pytest.raises(SystemExit):
        main(["build", "items", str(config)])
    assert "nearest known key is 'model'" in capsys.readouterr().err


def test_templates_of_the_user(world, backend, tmp_path, capsys):
    main(["prompts", "cp", str(tmp_path / "mine")])
    (tmp_path / "mine" / "mllm_srec.viu.txt").write_text("Only colors, please.")
    summarize_items(ItemOptions(world.folder, "rule", templates=tmp_path / "mine", limit=2))
    assert any("Only colors, please." in words_of(request.messages) for request in backend.asked)
    main(["prompts", "ls"])
    assert "{visual_summary}" in capsys.readouterr().out


def test_the_keyword_list_is_that_of_the_image_and_then_of_the_text():
    def told(text):
        return [("i", Result(b"", text, 1, 1, "stop"))]

    for image, text, expected in (
        ("blue, dress", "blue, Cotton", ["blue", "dress", "Cotton"]),
        ("1. red dress\n2. blue jeans\n3. hat", "Hat", ["red dress", "blue jeans", "hat"]),
        ("red<|im_end|>, a\u202eb", "", ["red", "a b"]),
    ):
        table = keyword_table(["i", "j"], told(image), told(text))
        assert table["keywords"].to_list() == [expected]
    dropped = Counter()
    keyword_table(["i"], told("Color: red, none"), told("Here are some keywords\n- RED"), dropped)
    assert dropped == {"labels": 1, "placeholders": 1, "sentences": 1}


def test_two_variants_over_the_same_item_texts(world, backend):
    split_of(world)
    summarize_items(ItemOptions(world.folder, "rule"))
    summarize_users(UserOptions(world.folder, "rule", parts=("train",)))
    summarize_users(UserOptions(world.folder, "rule", parts=("train",), window=2, step=2, tag="win2"))
    texts = world.folder / "texts"
    assert len(pl.read_parquet(texts / "tubc-win2-train.parquet")) > len(
        pl.read_parquet(texts / "tubc-train.parquet")
    )


def test_profiles_that_are_not_text(world):
    users = world.users.with_columns(profile=pl.int_range(pl.len()))
    numbers = write_dataset(
        world.folder.parent / "numbers",
        items=world.items.with_columns(images=pl.lit([], dtype=pl.List(pl.String))),
        interactions=world.interactions,
        users=users,
        source={},
    )
    assert profiles_of(numbers).to_list() == [str(number) for number in range(12)]
    numbers.users = users.with_columns(profile=pl.lit([1]))
    with pytest.raises(DataError, match="column 'profile'"):
        profiles_of(numbers)


def test_answers_that_were_cut_off_and_requests_that_failed_are_told(world, backend, monkeypatch, capsys):
    def cut(requests, decoding):
        for number, (key, _) in enumerate(requests):
            if number % 3:
                yield [Result(key, "The image sh", 5, decoding.max_new_tokens, "length")]
            else:
                yield [Result.failed(key, "server: 400")]

    monkeypatch.setattr(backend, "generate", cut)
    summarize_items(ItemOptions(world.folder, "rule", system="vlm4rec"))
    told = capsys.readouterr().out
    assert "34 answered now, 0 from the store, 17 failed" in told
    assert "34 answers were cut off at 160 tokens" in told
    assert "no text for common0: server: 400" in told and "--overwrite tries these again" in told


def test_a_run_in_which_every_request_fails_ends_with_an_error_and_no_file(world, backend, monkeypatch):
    def fail(requests, decoding):
        yield [Result.failed(key, "server: 400") for key, _ in requests]

    monkeypatch.setattr(backend, "generate", fail)
    with pytest.raises(DataError, match="none of 51 requests was answered; common0: server: 400"):
        summarize_items(ItemOptions(world.folder, "rule"))
    assert not (world.folder / "texts").exists()


def test_items_without_a_text_are_told(world, backend, capsys):
    split_of(world)
    summarize_items(ItemOptions(world.folder, "rule", limit=20))
    summarize_users(UserOptions(world.folder, "rule", parts=("train",)))
    assert "imsg: 31 of 51 items have no text in it" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"imsg-b.parquet does not exist \(texts that there are: imsg, "):
        summarize_users(UserOptions(world.folder, "rule", parts=("train",), item_texts="imsg-b", tag="b"))


def test_the_preference_of_a_user_knows_nothing_that_follows_a_held_out_target(tmp_path, backend):
    """One text stands for a user at every target: on a random split it ends before the first of them."""
    dataset = make_dataset(tmp_path / "d")
    catalog = dataset.items.with_columns(title="item")
    dataset = write_dataset(
        tmp_path / "titled", items=catalog, interactions=dataset.interactions, users=dataset.users, source={}
    )
    split = split_of(dataset, "random")
    summarize_items(ItemOptions(dataset.folder, "rule", system="mllmrec"))
    backend.asked.clear()
    summarize_users(UserOptions(dataset.folder, "rule", split="random", system="mllmrec"))
    asked = {request.id: words_of(request.messages) for request in backend.asked}
    assert len(asked) > 40  # equal prompts are asked once
    times, items = dataset.timestamps, dataset.items["item"]
    held_out = np.concatenate([split.rows(part, targets=True) for part in ("valid", "test")])
    for code, user in enumerate(dataset.users["user"]):
        targets = [(times[row], row) for row in held_out if dataset.user_codes[row] == code]
        train = [row for row in split.rows("train") if dataset.user_codes[row] == code]
        known = [row for row in train if not targets or (times[row], row) < min(targets)]
        if user not in asked:
            continue
        told = {item for item in items if item in asked[user]}
        assert told == {items[int(dataset.item_codes[row])] for row in known}
    _, metadata = read_texts(dataset.folder / "texts" / "preference.parquet")
    assert metadata["items_after_a_target"] > 0


def test_preferences_list_items_in_time_order_or_as_a_set_the_latest_or_drawn_ones(tmp_path, backend):
    """MLLMRec's release lists them in the order of the log's file."""
    times = np.random.default_rng(0).permutation(12)
    log = pl.DataFrame({"user": "u", "item": [f"thing{n:02d}" for n in times], "timestamp": times + 10**9})
    items = log.select("item", title="item").sort("item")
    users = pl.DataFrame({"user": ["u"]})
    dataset = write_dataset(
        tmp_path / "d", items=items, interactions=log, users=users, source={"made": "by a test"}
    )
    split_of(dataset)
    summarize_items(ItemOptions(dataset.folder, "rule", system="mllmrec"))

    def listed(number: int, **options: object) -> list[int]:
        backend.asked.clear()
        tag = f"way{number}"
        summarize_users(
            UserOptions(dataset.folder, "rule", system="mllmrec", tag=tag, store=tmp_path / tag, **options)
        )
        (request,) = backend.asked
        return [int(found) for found in re.findall(r"thing(\d+)", words_of(request.messages))]

    everything = list(range(10))  # the last two are held out
    assert listed(0) == everything
    assert listed(1, max_history=4) == everything[-4:]
    shuffled = listed(2, history_order="shuffled")
    assert shuffled != everything == sorted(shuffled) and listed(3, history_order="shuffled") == shuffled
    drawn = listed(4, max_history=4, sample_history=True)
    assert drawn == sorted(set(drawn)) and len(drawn) == 4 and drawn != everything[-4:]
    assert listed(5, max_history=4, sample_history=True) == drawn
    assert listed(6, max_history=10, sample_history=True) == everything
    _, metadata = read_texts(dataset.folder / "texts" / "preference-way4.parquet")
    assert metadata["sample_history"] is True and metadata["max_history"] == 4
    with pytest.raises(DataError, match="--sample-history draws --max-history"):
        listed(7, sample_history=True)

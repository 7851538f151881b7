"""The embedded model: what it sees and says on unseen worlds, its tokens, and how it is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recllm.data.toyworld import render
from recllm.errors import DataError
from recllm.files import sha256
from recllm.mllm import tiny
from recllm.mllm.chat import message
from recllm.mllm.tiny.architecture import SHAPES, Shape, _config_of
from recllm.mllm.tiny.lessons import LOOKS, SHARES, Lesson, Look, PictureBook, Teacher, tracked
from recllm.mllm.tiny.muon import Muon, orthogonalized
from recllm.mllm.tiny.tokenizer import SPECIAL_TOKENS, build_processor
from recllm.mllm.tiny.training import Course, batches_of, train
from recllm.prompts import TEMPLATES
from recllm.prompts.keywords import parse_keywords
from recllm.prompts.safe_text import IMAGE_MARK

SMALL = Shape(layers=2, hidden=64, heads=4, kv_heads=2, vision_width=32, vision_depth=1, vision_heads=2)
BRIEF = Course(looking=2, steps=2, comparing=1, pictures=4, lessons=4, questions=2, rehearsed=2, drawn=1)


@pytest.fixture(scope="module")
def loaded(tiny_path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny_path, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor(SMALL.min_pixels, SMALL.max_pixels)


def answers(loaded: tuple[Any, Any], lessons: list[Lesson], seed: int) -> list[tuple[str, bool]]:
    """What the model says to each chat about newly drawn pictures, and whether it ended by itself."""
    model, processor = loaded
    rng = np.random.default_rng([seed, 20_260_101])
    told = []
    for first in range(0, len(lessons), 50):
        part = lessons[first : first + 50]
        chats = [list(lesson.messages[:-1]) for lesson in part]
        texts = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        pictures = [render(k.color, k.pattern, k.shape, rng) for lesson in part for k in lesson.looks]
        batch = processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=128)[:, batch["input_ids"].shape[1] :]
        ends = torch.isin(tokens, torch.tensor(model.generation_config.eos_token_id)).any(1)
        told += zip(processor.batch_decode(tokens, skip_special_tokens=True), ends.tolist(), strict=True)
    return told


def test_names_color_pattern_and_shape_of_unseen_pictures(loaded: tuple[Any, Any]) -> None:
    lessons = list(Teacher(np.random.default_rng(77)).lessons(384, Teacher.viu))
    right = sum(
        text == lesson.answer for lesson, (text, _) in zip(lessons, answers(loaded, lessons, 1), strict=True)
    )
    assert right / len(lessons) >= 0.95


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        (Teacher.imsg, 0.95),
        (Teacher.tubc, 0.75),
        (Teacher.grounding, 0.95),
        (Teacher.grounding_with_title, 0.95),
        (Teacher.description, 0.8),
        (Teacher.text_keywords, 0.9),
    ],
)
def test_follows_the_builders_prompts(
    loaded: tuple[Any, Any], kind: Callable[[Teacher], Lesson], least: float
) -> None:
    lessons = list(Teacher(np.random.default_rng(78)).lessons(200, kind))
    told = answers(loaded, lessons, 2)
    assert sum(text == lesson.answer for lesson, (text, _) in zip(lessons, told, strict=True)) >= least * 200
    assert sum(ended for _, ended in told) >= 0.99 * 200


def test_window_answers_have_the_form_and_the_right_looks(loaded: tuple[Any, Any]) -> None:
    lessons = list(Teacher(np.random.default_rng(82)).lessons(200, Teacher.tubc))
    told = [text for text, _ in answers(loaded, lessons, 6)]
    parts = [[sentence for sentence in text.split(". ") if "Lately" not in sentence] for text in told]
    wanted = [[part for part in lesson.answer.split(". ") if "Lately" not in part] for lesson in lessons]
    assert sum(one == other for one, other in zip(parts, wanted, strict=True)) >= 190


def test_preferences_name_what_the_user_had_and_end(loaded: tuple[Any, Any]) -> None:
    lessons = list(Teacher(np.random.default_rng(79)).lessons(100, Teacher.preference))
    told = answers(loaded, lessons, 3)
    assert all(ended for _, ended in told)
    latest = [lesson.answer.partition(" and ")[0] for lesson in lessons]
    assert sum(text.startswith(start) for start, (text, _) in zip(latest, told, strict=True)) >= 90


def test_image_keywords_parse_into_the_three_attributes(loaded: tuple[Any, Any]) -> None:
    lessons = list(Teacher(np.random.default_rng(80)).lessons(100, Teacher.image_keywords))
    looks = [lesson.looks[0] for lesson in lessons]
    told = [parse_keywords(text) for text, _ in answers(loaded, lessons, 4)]
    assert sum(words == [k.color, k.pattern, k.shape] for words, k in zip(told, looks, strict=True)) >= 95


@pytest.mark.parametrize("kind", [Teacher.question, Teacher.chain])
def test_questions_are_answered_in_form_also_with_several_images(
    loaded: tuple[Any, Any], kind: Callable[[Teacher], Lesson]
) -> None:
    lessons = list(Teacher(np.random.default_rng(81)).lessons(60, kind))
    assert max(len(lesson.looks) for lesson in lessons) >= 4
    assert {text for text, _ in answers(loaded, lessons, 5)} <= {"Yes.", "No."}


def test_checkpoint_is_a_plain_folder_with_qwens_settings(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    token = processor.tokenizer.convert_tokens_to_ids
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert model.generation_config.eos_token_id == [token("<|im_end|>"), token("<|endoftext|>")]
    assert not model.generation_config.do_sample
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    assert model.config.image_token_id == token("<|image_pad|>")
    assert 1_000_000 < sum(weight.numel() for weight in model.parameters()) < 2_500_000


# tokens -----------------------------------------------------------------------------------------------------


def test_yes_and_no_are_one_token_where_an_answer_starts(processor: Any) -> None:
    tokenizer = processor.tokenizer
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    for word in ("Yes", "No", "yes", "no", " Yes", " No", " yes", " no"):
        assert len(tokenizer(word)["input_ids"]) == 1
        assert tokenizer(f"<|im_start|>assistant\n{word}.")["input_ids"][: len(header) + 1] == [
            *header,
            tokenizer(word)["input_ids"][0],
        ]


def test_special_tokens_are_single_and_follow_the_vocabulary_in_qwens_order(processor: Any) -> None:
    tokenizer = processor.tokenizer
    ids = [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS]
    first = len(tokenizer) - len(SPECIAL_TOKENS)
    assert ids == [[first + number] for number in range(len(SPECIAL_TOKENS))]
    assert set(SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)
    assert 1500 <= len(tokenizer) <= SHAPES["tiny"].vocabulary


@pytest.mark.parametrize(
    "text", ["Ünïcode ß 漢字 🎈", "  two  spaces\n\n\ttab ", "a\u200db", "1234567 + 3.5"]
)
def test_any_text_survives_the_tokenizer(processor: Any, text: str) -> None:
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_image_part_becomes_one_slot_of_its_visual_tokens(processor: Any, count: int) -> None:
    chat = [message("user", f"1. {IMAGE_MARK} mug" * count)]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|vision_start|><|image_pad|><|vision_end|>") == count
    picture = render("red", "plain", "star", np.random.default_rng(0))
    batch = processor(text=[text], images=[picture] * count, return_tensors="pt")
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 4 * count
    assert int(batch["image_grid_thw"].prod(1).sum()) == 16 * count


def test_a_large_picture_costs_at_most_sixteen_tokens(processor: Any) -> None:
    picture = render("red", "plain", "star", np.random.default_rng(0), size=400).resize((300, 450))
    grid = processor.image_processor([picture], return_tensors="pt")["image_grid_thw"]
    assert 4 < int(grid.prod()) // 4 <= 16


# lessons ----------------------------------------------------------------------------------------------------


def test_the_loss_is_on_what_the_assistant_says_and_nothing_else(processor: Any) -> None:
    lessons = list(Teacher(np.random.default_rng(5)).lessons(120))
    book = PictureBook(np.random.default_rng(6), 1)
    spoken = []
    for batch in batches_of(lessons, processor, book, tokens=2000):
        assert batch["input_ids"].numel() <= 2000 or len(batch["input_ids"]) == 1
        for row in batch["targets"]:
            spoken.append(processor.tokenizer.decode(row[row >= 0]))
    expected = [
        "".join(
            f"{turn['content'][0]['text']}<|im_end|>"
            for turn in lesson.messages
            if turn["role"] == "assistant"
        )
        for lesson in lessons
    ]
    assert sorted(spoken) == sorted(expected)


def test_every_image_part_has_its_look_and_all_looks_are_drawn() -> None:
    lessons = list(Teacher(np.random.default_rng(7)).lessons(2000))
    for lesson in lessons:
        parts = [part for turn in lesson.messages for part in turn["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(lesson.looks)
    assert {look for lesson in lessons for look in lesson.looks} == set(LOOKS)
    assert max(len(lesson.looks) for lesson in lessons) >= 4


def test_a_window_answer_tells_the_last_look_what_recurs_and_the_window_before() -> None:
    plain, striped = Look("red", "plain", "star"), Look("red", "striped", "star")
    black = Look("black", "plain", "circle")
    first = tracked([plain], "")
    second = tracked([plain, striped, None], first)
    third = tracked([plain, striped, black], second)
    assert first == "Last: red, plain star. Lately: any color, any pattern, any shape."
    assert second == ("Last: red, striped star. Lately: red, any pattern, star. Before: red, plain star.")
    assert third == (
        "Last: black, plain circle. Lately: any color, plain, any shape. Before: red, striped star."
    )
    assert tracked([None], "") == "Last: unknown. Lately: any color, any pattern, any shape."


# training and keeping ---------------------------------------------------------------------------------------


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.detach().numpy().tobytes())
    return digest.hexdigest()


def test_the_seed_decides_the_weights_and_nothing_around_it_does() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = weights_hash(train(3, SMALL, BRIEF, progress=False)[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002 - the global generator that must not matter
    assert weights_hash(train(3, SMALL, BRIEF, progress=False)[0]) == one
    assert weights_hash(train(4, SMALL, BRIEF, progress=False)[0]) != one


def test_a_brief_training_is_written_as_a_checkpoint_that_computes_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from recllm.mllm import load
    from recllm.mllm.tiny import training

    monkeypatch.setattr(training, "Course", lambda: BRIEF)
    folder = tiny.train_checkpoint(tmp_path / "small", seed=5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 5
    assert manifest["course"]["steps"] == BRIEF.steps
    loaded = load(folder)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert "Training the embedded model" in capfd.readouterr().err
    with pytest.raises(DataError, match="exists already"):
        tiny.train_checkpoint(folder)
    with pytest.raises(DataError, match="seed=-1"):
        tiny.train_checkpoint(tmp_path / "other", seed=-1)


def test_the_package_has_the_checkpoint_and_its_manifest(tiny_path: Path) -> None:
    manifest = json.loads((tiny_path / "manifest.json").read_text())
    assert manifest["weights_sha256"] == sha256(tiny_path / "model.safetensors")
    assert manifest["seed"] == 0
    assert manifest["lessons"].keys() == {kind.__name__ for kind in SHARES}
    assert manifest["templates"].keys() <= TEMPLATES.keys()
    assert manifest["templates"]
    assert sum(file.stat().st_size for file in tiny_path.iterdir()) < 4_000_000


def test_an_incomplete_installation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recllm.mllm.tiny import checkpoint

    monkeypatch.setattr(checkpoint, "_FOLDER", tmp_path)
    with pytest.raises(DataError, match="train-tiny"):
        tiny.checkpoint_folder()


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_steps_as_torchs_does_but_for_bfloat16(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for _ in range(3)]
    ours = [torch.nn.Parameter(each.clone()) for each in start]
    theirs = [torch.nn.Parameter(each.clone()) for each in start]
    pairs = (
        (Muon(ours, lr=0.02, weight_decay=0.1), ours),
        (torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs),
    )
    for _ in range(5):
        gradients = [torch.randn(shape, generator=generator) for _ in start]
        for optimizer, weights in pairs:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for one, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        assert moved > 0.05
        assert (one - other).norm() < 0.03 * moved


def test_orthogonalized_matrices_keep_their_singular_vectors() -> None:
    matrices = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ orthogonalized(matrices) @ right.mT
    torch.testing.assert_close(values, torch.diag_embed(values.diagonal(dim1=1, dim2=2)), atol=1e-4, rtol=0)
    assert float(values.diagonal(dim1=1, dim2=2).min()) > 0.5
    assert float(values.diagonal(dim1=1, dim2=2).max()) < 1.5


# random weights of any size ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen2-vl-2b", 2_208_985_600), ("qwen2-vl-7b", 8_291_375_616)]
)
def test_published_shapes_have_the_published_number_of_parameters(
    processor: Any, name: str, parameters: int
) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(_config_of(SHAPES[name], processor.tokenizer))
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_random_weights_are_written_as_they_are_made(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    made, processor = tiny.random_model(SMALL, dtype="float32", seed=3)
    folder = tiny.build_random(SMALL, tmp_path / "random", seed=3)
    read = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert weights_hash(made) == weights_hash(read)
    assert weights_hash(made) != weights_hash(tiny.random_model(SMALL, dtype="float32", seed=4)[0])
    text = processor.apply_chat_template([message("user", f"{IMAGE_MARK}mug")], tokenize=False)
    picture = render("red", "plain", "star", np.random.default_rng(0))
    batch = AutoProcessor.from_pretrained(folder)(text=[text], images=[picture], return_tensors="pt")
    with torch.inference_mode():
        # also the buffers, which are not written: positions would otherwise differ
        torch.testing.assert_close(made(**batch).logits, read(**batch).logits)


def test_random_weights_have_the_asked_deviation_and_type() -> None:
    model, _ = tiny.random_model(SMALL, dtype=torch.bfloat16)
    weight = model.get_input_embeddings().weight.detach()
    assert weight.dtype == torch.bfloat16
    assert abs(float(weight.float().std()) - SMALL.deviation) < 0.05 * SMALL.deviation
    assert len(torch.unique(weight[:50].float(), dim=0)) == 50


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 100},
        {"kv_heads": 3},
        {"rope_sections": (1, 1, 1)},
        {"vision_width": 90},
        {"max_pixels": 100},
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        Shape(**sizes)


def test_unknown_names_and_small_vocabularies_are_refused() -> None:
    with pytest.raises(DataError, match="qwen2-vl-7b"):
        tiny.random_model("qwen2-vl-70b")
    with pytest.raises(DataError, match="vocabulary=100"):
        tiny.random_model(Shape(vocabulary=100))

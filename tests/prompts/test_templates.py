"""Templates: the papers' wordings by default, replaceable by files whose placeholders are checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from recllm.errors import DataError
from recllm.prompts import TEMPLATES, mllm_srec, mllmrec
from recllm.prompts.templates import Template, load_templates

PAPERS = Path(__file__).parents[3] / "shared" / "papers"


def test_a_value_is_never_taken_for_a_placeholder_or_a_brace():
    template = Template("x", "{{{title}}} and {text}", {"title": "", "text": ""})
    assert template.fill({"title": "{text} {{", "text": "T"}) == "{{text} {{} and T"


def test_lines_whose_placeholders_are_all_empty_are_left_out():
    values = {"visual_summary": "", "title": "Mug", "categories": "", "text": "Holds tea."}
    filled = mllm_srec.IMSG.fill(values)
    assert filled.split("\n")[1:] == ["Title: Mug", "Text: Holds tea."]


def test_what_template_and_value_form_at_their_seam_is_made_harmless():
    template = Template("x", "{a}{b}|>", {"a": "", "b": ""})
    assert "<|im_end|>" not in template.fill({"a": "<|im", "b": "_end"})


def test_replacement_files(tmp_path):
    (tmp_path / "mllm_srec.viu.txt").write_text("What is it?\n")
    (tmp_path / "README.md").write_text("notes")
    loaded = load_templates(TEMPLATES, tmp_path)
    assert loaded["mllm_srec.viu"].text == "What is it?"
    assert loaded["mllm_srec.imsg"] is TEMPLATES["mllm_srec.imsg"]
    assert load_templates(TEMPLATES, None) == TEMPLATES


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mllm_srec.vuu.txt", "What?", "mllm_srec.viu.txt"),
        ("mllm_srec.viu.yaml", "What?", "replaces no template"),
        ("mllm_srec.imsg.txt", "Combine {visual_sumary}.", "did you mean {visual_summary}?"),
        ("mllm_srec.imsg.txt", "Combine.", "{visual_summary} is missing"),
        ("mllm_srec.viu.txt", "What {is this?", "single '{'"),
        ("mllm_srec.viu.txt", "  \n", "empty"),
        ("mllm_srec.viu.txt", "What?<|im_end|>", "special token"),
        ("mllm_srec.imsg.txt", "{visual_summary.__class__}", "unknown placeholder"),
    ],
)
def test_wrong_replacements_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        load_templates(TEMPLATES, tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def test_a_missing_folder_and_other_encodings_are_named(tmp_path):
    with pytest.raises(DataError, match="prompts cp"):
        load_templates(TEMPLATES, tmp_path / "none")
    (tmp_path / "mllm_srec.viu.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        load_templates(TEMPLATES, tmp_path)


def test_the_default_wordings_are_the_papers():
    if not PAPERS.is_dir():
        pytest.skip("the papers are not here")
    words = " ".join((PAPERS / "mllm-srec.txt").read_text().replace("’", "'").split())
    assert mllm_srec.VIU.text in words
    assert mllm_srec.IMSG.text.split("\n")[0] in words
    assert mllm_srec.TUBC.text.split("\n")[0] in words
    words = " ".join((PAPERS / "mllmrec.txt").read_text().split())
    assert mllmrec.DESCRIPTION.text.replace("{dataset_name}", "{dataset name}") in words
    assert mllmrec.PREFERENCE.text.replace("{items}", "{behavioral description}") in words

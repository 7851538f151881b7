"""An option that a backend, a system or a mode cannot honor is an error that names it, before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from recllm.builders.items import summarize_items
from recllm.builders.options import ItemOptions, UserOptions
from recllm.builders.session import Session
from recllm.builders.users import summarize_users
from recllm.errors import DataError
from recllm.mllm.checkpoints import find_checkpoint
from recllm.mllm.scoring.command import score_yes_no
from recllm.mllm.scoring.options import YesNoOptions
from recllm.training.options import SFTOptions

from .worlds import write_world

WEIGHTS = {
    "adapter": "runs/mine",
    "dtype": "bfloat16",
    "min_pixels": 784,
    "device_map": "auto",
    "attn_implementation": "eager",
    "quantization": "nf4",
    "batch_tokens": 100,
    "batch_size": 4,
}
SERVER = {"base_url": "http://there:1/v1", "api_key_env": "KEY", "concurrency": 2}
DROPPED = [
    *(("server", name, value) for name, value in {**WEIGHTS, "tensor_parallel_size": 2}.items()),
    *(
        ("vllm", name, value)
        for name, value in {**WEIGHTS, **SERVER}.items()
        if name not in ("adapter", "dtype")
    ),
    *(("transformers", name, value) for name, value in {**SERVER, "tensor_parallel_size": 2}.items()),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("options") / "world").folder


def refused(dataset: Path, words: str, **options) -> None:
    with pytest.raises(DataError, match=words):
        summarize_items(ItemOptions(dataset, "no such model", **options))
    assert not (dataset / "texts").exists() and not (dataset / "generations").exists()


@pytest.mark.parametrize(
    "backend, name, value", [case for case in DROPPED if case[:2] != ("vllm", "min_pixels")]
)
def test_an_option_that_a_backend_does_not_have_is_refused(dataset, backend, name, value):
    flag = name.replace("_", "-")
    refused(
        dataset,
        rf"--{flag} has no effect with --backend {backend}.*Leave it out",
        backend=backend,
        **{name: value},
    )


def test_all_of_several_are_named(dataset):
    refused(
        dataset,
        "--adapter, --min-pixels, --quantization have no effect",
        backend="server",
        **WEIGHTS
        | {
            "dtype": "auto",
            "device_map": None,
            "attn_implementation": None,
            "batch_tokens": 16_384,
            "batch_size": 32,
        },
    )


@pytest.mark.parametrize("backend", ["transformers", "vllm", "server"])
def test_defaults_and_what_a_backend_has_are_taken(dataset, backend):
    fitting = {
        "transformers": {**WEIGHTS, "max_pixels": 5000},
        "vllm": {"adapter": "a", "dtype": "float16", "min_pixels": 784, "tensor_parallel_size": 2},
        "server": {**SERVER, "max_pixels": 5000, "revision": "mine"},
    }
    Session(ItemOptions(dataset, "model", backend=backend))
    Session(ItemOptions(dataset, "model", backend=backend, **fitting[backend]))
    Session(ItemOptions(dataset, "model", backend=backend, dry_run=True, batch_size=4))


@pytest.mark.parametrize("change", [{"seed": 3}, {"top_p": 0.5}])
def test_what_sampling_alone_uses_is_refused_of_greedy_decoding(dataset, change):
    refused(dataset, "no effect with greedy decoding.*--temperature", **change)
    Session(ItemOptions(dataset, "model", temperature=0.7, **change))


def test_prices_are_for_a_dry_run_and_go_together(dataset):
    refused(dataset, "--price-in, --price-out have no effect.*--dry-run", price_in=1.0, price_out=2.0)
    refused(dataset, "needs both", price_in=1.0, dry_run=True)


@pytest.mark.parametrize(
    "change",
    [{"with_title": True}, {"dataset_name": "Amazon Baby"}, {"with_title": True, "system": "mllmrec"}],
)
def test_options_of_another_system_about_items_are_refused(dataset, change):
    refused(dataset, "has no effect with --system", **change)


@pytest.mark.parametrize(
    "change",
    [
        {"max_prompt_tokens": 100},
        {"leak_all_interactions": True},
        {"system": "mllmrec", "window": 2, "step": 2},
        {"max_history": 3, "sample_history": True},
        {"history_order": "shuffled"},
        {"system": "mllmrec", "parts": ("test",)},
    ],
)
def test_options_of_another_system_about_users_are_refused(dataset, change):
    with pytest.raises(DataError, match=r"ha(s|ve) no effect with --system"):
        summarize_users(UserOptions(dataset, "no such model", **change))


def test_a_revision_of_what_has_none_is_refused(tmp_path):
    for name in ("tiny", str(tmp_path)):
        with pytest.raises(DataError, match="no revision 'main'; leave it out"):
            find_checkpoint(name, "main")


def test_the_length_of_steps_that_nobody_generates_is_refused(tmp_path):
    with pytest.raises(DataError, match="--step-tokens has no effect without --generate-steps"):
        score_yes_no(YesNoOptions(tmp_path, model="tiny", step_tokens=64))


def test_a_warm_up_of_a_constant_learning_rate_is_refused():
    with pytest.raises(DataError, match=r"--warmup has no effect.*constant_with_warmup"):
        SFTOptions(schedule="constant", warmup=0.1)
    SFTOptions(schedule="constant")
    SFTOptions(schedule="constant", warmup=0.0)

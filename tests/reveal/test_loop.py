"""The loop: what it runs, when it ends, which cycle it chooses, and that it resumes wherever it was cut."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from recllm.builders import session
from recllm.cli import COMMANDS, main
from recllm.config import parse_config
from recllm.data.candidates import full_ranking
from recllm.data.splits import Split
from recllm.errors import DataError
from recllm.evaluation.ranks import RankRecords
from recllm.files import read_json, write_json
from recllm.mllm.chat import Request
from recllm.rankers.options import class_of_arguments
from recllm.reveal import loop
from recllm.reveal.loop import reveal
from recllm.reveal.options import RevealOptions
from recllm.steps import Step
from tests.reveal.test_rewriting import GOOD, Answering
from tests.reveal.worlds import write_shop

SMALL = ("epochs=2", "width=8", "layers=1", "inner=8", "experts=2", "batch_size=64")


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> SimpleNamespace:
    split = write_shop(tmp_path_factory.mktemp("loop") / "shop")
    return SimpleNamespace(split=split, folder=split.dataset.folder)


def options_of(shop: SimpleNamespace, out: Path, **options: object) -> RevealOptions:
    return RevealOptions(shop.folder, "hm4sr", "tiny", out=out, **{"training": SMALL, **options})


def in_this_process(step: Step) -> None:
    """Runs a step as its command would, without starting a process."""
    if step.words[0] == "recllm":
        main(list(step.words[1:]))
        return
    before, sys.argv = sys.argv, list(step.words[1:])
    try:
        runpy.run_path(step.words[1], run_name="__main__")
    finally:
        sys.argv = before


class Pretending:
    """Makes what steps make without running them; the cycles' validation and rewriting are given.

    Args:
        shop: The dataset.
        ranks: For each cycle, the rank that every validation target has.
        changed: For each cycle, how many prompts are rewritten for it.
    """

    def __init__(self, shop: SimpleNamespace, ranks: Sequence[int], changed: Sequence[int] = (0, 5, 5, 5, 5)):
        self.done: list[Step] = []
        self._shop, self._ranks, self._changed = shop, ranks, changed

    def __call__(self, step: Step) -> None:
        self.done.append(step)
        path = Path(step.makes)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "run-valid.parquet":
            self._write_ranks(path)
        elif path.name == "prompts.parquet" and path.parent.name != "cycle-0":
            count = self._changed[int(path.parent.name[-1])]
            record = pl.DataFrame({"status": ["rewritten"] * count + ["form"] * 3})
            record.write_parquet(path.with_name("prompts-rewrites.parquet"))
            path.touch()
        elif path.name == "metrics.json":
            write_json(path, {})
        else:
            path.touch()

    def _write_ranks(self, path: Path) -> None:
        ranking = full_ranking(self._shop.split, "valid")
        count = len(ranking.users)
        above = np.full(count, self._ranks[int(path.parents[1].name[-1])] - 1)
        above[0] = 39  # not all alike
        items = ranking.item_ids.gather(ranking.positives)
        ones, all_items = np.ones(count, np.int64), np.full(count, 40)
        RankRecords(ranking.user_ids, items, above, ones, all_items, "user", ranking.protocol, "run").save(
            path
        )


@pytest.fixture
def quick(monkeypatch) -> None:
    """Leaves out the versions in a manifest, which asks git each time."""
    monkeypatch.setattr(loop, "describe_run", dict)


def manifest_of(out: Path) -> dict:
    found = read_json(out / "manifest.json", "")
    return {name: found[name] for name in ("status", "cycles", "chosen", "ended")}


@pytest.mark.parametrize(
    ("ranks", "changed", "cycles", "trained", "chosen", "why"),
    [
        ((5, 3, 4), (0, 5, 5), 3, 3, 1, "all cycles are done"),
        ((2, 3, 4, 1), (0, 5, 5, 5), 4, 3, 0, "validation ndcg@10 fell 2 times in a row"),
        ((5, 3, 4, 1), (0, 5, 5, 5), 4, 4, 3, "all cycles are done"),
        ((5, 5, 1), (0, 5, 0), 3, 2, 0, "no prompt changed"),
        ((5,), (0,), 1, 1, 0, "all cycles are done"),
    ],
)
def test_when_it_ends_and_which_cycle_it_chooses(
    shop, tmp_path, quick, ranks, changed, cycles, trained, chosen, why
):
    run = Pretending(shop, ranks, changed)
    found = reveal(options_of(shop, tmp_path / "out", cycles=cycles), run)
    told = manifest_of(tmp_path / "out")
    assert (len(told["cycles"]), told["chosen"], told["ended"]) == (trained, chosen, why)
    assert found == tmp_path / "out" / f"cycle-{chosen}" / "run" and told["status"] == "finished"
    assert [row["rewritten"] for row in told["cycles"]] == list(changed[:trained])
    assert sum(step.makes.endswith("metrics.json") for step in run.done) == trained


def test_every_step_is_a_command_that_parses(shop, tmp_path):
    out, templates = tmp_path / "out", tmp_path / "templates"
    templates.mkdir()
    (tmp_path / "launch.yaml").touch()
    run = Pretending(shop, (5, 3))
    more = {"rewrite": "random", "calls": "two", "never_retrieved": True, "avl_alpha": 0.3}
    launch = {"launch": tmp_path / "launch.yaml", "templates": templates, "pooling": "last"}
    reveal(options_of(shop, out, cycles=2, **more, **launch), run)
    seen: dict[str, object] = {}
    for step in run.done:
        words = list(step.words)
        if "train_ranker.py" in " ".join(words):
            rest = words[next(n for n, word in enumerate(words) if word.endswith("train_ranker.py")) + 1 :]
            training = parse_config(class_of_arguments(rest), rest)
            assert (training.avl, training.avl_alpha, training.epochs) == ("gradients", 0.3, 2)
            assert training.valid_only == str(out / "choosing-users.parquet")
            continue
        words = words[words.index("recllm.cli") + 1 :] if words[0] == "accelerate" else words[1:]
        name = " ".join(words[:2])
        module, config, _, _ = COMMANDS[name]
        seen[name] = parse_config(getattr(importlib.import_module(module), config), words[2:])
    assert set(seen) == {
        "build image-prompts",
        "embed images",
        "score ranker",
        "build image-feedback",
        "build image-rewrites",
    }
    assert seen["score ranker"].part == "valid" and seen["score ranker"].top_k == 40
    assert seen["build image-feedback"].users == out / "critic-users.parquet"
    rewrites = seen["build image-rewrites"]
    assert (rewrites.choose, rewrites.calls, rewrites.choice_seed) == ("random", "two", 42)
    assert [step.words[0] for step in run.done].count("accelerate") == 5


def test_it_resumes_after_any_interruption_and_does_nothing_twice(shop, tmp_path, quick):
    whole = Pretending(shop, (5, 3))
    reveal(options_of(shop, tmp_path / "out", cycles=2), whole)
    expected = manifest_of(tmp_path / "out")
    steps = len(whole.done)
    assert steps == 1 + 2 * 3 + 2
    for last in range(steps):
        run = Pretending(shop, (5, 3))
        out = tmp_path / f"cut-{last}"

        def cut(step: Step, run: Pretending = run, last: int = last) -> None:
            if len(run.done) == last:
                raise KeyboardInterrupt
            run(step)

        with pytest.raises(KeyboardInterrupt):
            reveal(options_of(shop, out, cycles=2), cut)
        assert read_json(out / "manifest.json", "")["status"] == "running"
        reveal(options_of(shop, out, cycles=2), run)
        assert manifest_of(out) == expected
        assert [Path(step.makes).relative_to(out) for step in run.done] == [
            Path(step.makes).relative_to(tmp_path / "out") for step in whole.done
        ]
    again = Pretending(shop, (5, 3, 1))
    reveal(options_of(shop, tmp_path / "out", cycles=3), again)  # a further cycle on top of those
    assert len(again.done) == 5 and manifest_of(tmp_path / "out")["chosen"] == 2


def test_ablations(shop, tmp_path, quick):
    static = Pretending(shop, (5,))
    reveal(options_of(shop, tmp_path / "static", fve=False, avl="none"), static)
    assert len(static.done) == 4 and "--avl" not in " ".join(static.done[2].words)
    assert manifest_of(tmp_path / "static")["ended"] == "prompts stay as they are (--no-fve)"
    seeing = Pretending(shop, (5,))
    reveal(options_of(shop, tmp_path / "seeing", cycles=1, training=("without=text",)), seeing)
    assert "--without text" in " ".join(seeing.done[2].words)
    guided = Pretending(shop, (5, 3))
    reveal(options_of(shop, tmp_path / "guided", cycles=2), guided)
    assert "--choose feedback" in " ".join(guided.done[-4].words)


@pytest.mark.parametrize("ranker", ["missrec", "m3srec", "stosa_m3", "hm4sr"])
def test_the_papers_backbones_take_the_same_flags(shop, tmp_path, quick, ranker):
    run = Pretending(shop, (5,))
    options = RevealOptions(shop.folder, ranker, "tiny", cycles=1, out=tmp_path / "out")
    reveal(options, run)
    (words,) = [step.words for step in run.done if step.words[0] == "python"]
    training = parse_config(class_of_arguments(words[2:]), list(words[2:]))
    assert (training.ranker, training.avl) == (ranker, "gradients")
    assert training.image == str(tmp_path / "out" / "cycle-0" / "images.safetensors")


def test_the_commands_of_the_documentation_parse():
    text = (Path(__file__).parents[2] / "docs" / "reveal.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    parsed = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        command = next(" ".join(words[1:end]) for end in (4, 3, 2) if " ".join(words[1:end]) in COMMANDS)
        module, options, _, _ = COMMANDS[command]
        flags = words[1 + len(command.split()) :]
        parse_config(getattr(importlib.import_module(module), options), flags)
        parsed.add(command)
    assert "reveal" in parsed and len(parsed) == len(lines) == 5
    named = set(re.findall(r"`recllm ((?:build|embed|score|prompts)[a-z -]*[a-z])", text))
    assert {each.split(" --")[0] for each in named} <= set(COMMANDS)


def test_halves_and_a_step_that_writes_nothing(shop, tmp_path):
    with pytest.raises(DataError, match="ended well, but did not write"):
        reveal(options_of(shop, tmp_path / "out"), lambda step: None)
    critic, choosing = (
        set(pl.read_parquet(tmp_path / "out" / f"{name}-users.parquet")["user"])
        for name in ("critic", "choosing")
    )
    assert not critic & choosing and len(critic) == len(choosing) == 12


def test_what_cannot_be_done_is_refused(shop, tmp_path):
    def refused(match: str, **options: object) -> None:
        with pytest.raises(DataError, match=match):
            reveal(options_of(shop, tmp_path / "no", **options), lambda step: None)
        assert not (tmp_path / "no").exists()

    refused("--cycles 0: expected 1 or more", cycles=0)
    refused("--share has no effect with --no-fve", fve=False, share=0.5)
    refused("--avl-alpha has no effect with --avl none", avl="none", avl_alpha=0.1)
    refused("--base-url has no effect with --backend transformers", base_url="http://x")
    refused("expected name=value", training=("epochs",))
    refused("hm4sr has no option epoch; the nearest is epochs", training=("epoch=3",))
    refused("the loop sets seed itself", training=("seed=3",))
    refused("REVEAL has nothing to improve then", avl="none", training=("without=image",))
    refused("--recipe .*: no such file", recipe=tmp_path / "none.yaml")
    with pytest.raises(DataError, match="it reads no images"):
        reveal(RevealOptions(shop.folder, "sasrec", "tiny", out=tmp_path / "no", avl="none"))
    reveal(options_of(shop, tmp_path / "out", cycles=1), Pretending(shop, (5,)))
    with pytest.raises(DataError, match=r"share: 0\.25 then, 0\.5 now"):
        reveal(options_of(shop, tmp_path / "out", cycles=1, share=0.5), Pretending(shop, (5,)))
    (tmp_path / "other").mkdir()
    write_json(tmp_path / "other" / "manifest.json", {"kind": "sft run"})
    with pytest.raises(DataError, match="is a sft run, not a folder of"):
        reveal(options_of(shop, tmp_path / "other"), Pretending(shop, (5,)))


@pytest.fixture
def critic(monkeypatch) -> Answering:
    """A critic that asks each item's prompt to look at something else."""

    def answer(request: Request) -> str:
        return GOOD.replace("glaze", f"glaze, rim {request.id}")

    backend = Answering(answer)
    monkeypatch.setattr(session, "make_backend", lambda options: backend)
    return backend


def test_two_real_cycles_and_no_look_at_the_test_part(shop, tmp_path, critic, monkeypatch):
    opened: list[str] = []
    scan: Callable = Split.scan
    monkeypatch.setattr(
        Split, "scan", lambda self, part, **more: opened.append(part) or scan(self, part, **more)
    )
    out = tmp_path / "out"
    run = reveal(options_of(shop, out, cycles=2), in_this_process)
    assert set(opened) == {"train", "valid"}
    told = manifest_of(out)
    for row in told["cycles"]:
        own = read_json(out / f"cycle-{row['cycle']}" / "run" / "metrics.json", "")
        assert own["valid"] == pytest.approx(row["valid"])  # chosen by the same lists as the epoch
        assert row["critic"] != row["valid"]
    assert run == out / f"cycle-{told['chosen']}" / "run"
    log = (run / "log.jsonl").read_text()
    assert '"avl_k"' in log
    first, second = (load_file(out / f"cycle-{number}" / "images.safetensors") for number in range(2))
    record = pl.read_parquet(out / "cycle-1" / "prompts-rewrites.parquet")
    rewritten = set(record.filter(pl.col("status") == "rewritten")["id"])
    assert len(rewritten) == told["cycles"][1]["rewritten"] == len(critic.asked) > 3
    assert {item for item in first if not torch.equal(first[item], second[item])} == rewritten
    texts = " ".join(str(request.messages) for request in critic.asked)
    assert "secret" not in texts  # stands in test reviews alone
    main(["score", "ranker", str(run), "--out", str(tmp_path)])
    assert RankRecords.load(tmp_path / "ranks" / "run.parquet").protocol == "loo/full/mask-seen"

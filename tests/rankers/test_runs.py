"""Runs of rankers as a user has them: trained, resumed, killed, shared by two processes, scored."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from recllm.cli import main as recllm_main
from recllm.config import parse_config, run_command
from recllm.data import splits
from recllm.data.candidates import CandidateOptions, full_ranking, make_candidates
from recllm.data.dataset import Dataset, write_dataset
from recllm.data.splits import Split, SplitOptions, make_split
from recllm.errors import DataError
from recllm.evaluation.inputs import Candidates, read_system
from recllm.evaluation.metrics import compute_metrics
from recllm.evaluation.ranks import RankRecords
from recllm.files import read_json, write_json
from recllm.rankers import RANKERS, ranker_class
from recllm.rankers.fit import FitOptions, fit, seed_weights
from recllm.rankers.options import TrainRankerOptions, class_of_arguments, options_class
from recllm.rankers.ranking import some_lists, user_states
from recllm.rankers.run_folder import begin_run, load_run, open_run
from recllm.rankers.training_data import TrainingData
from recllm.recipe_files import recipe_names, recipe_path
from tests.rankers.worlds import tiny_split
from tests.training.ports import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "recipes" / "train_ranker.py")
USERS, ITEMS, LENGTH = 60, 40, 9
ORDER = ("--feature-order", "dataset")


def write_log(out: Path) -> Dataset:
    """Writes a log in which item i is followed by item i + 1 (mod the catalog), with a few jumps."""
    random = np.random.default_rng(3)
    rows = []
    for user in range(USERS):
        item = int(random.integers(ITEMS))
        for step in range(LENGTH):
            rows.append(
                {"user": f"u{user}", "item": f"i{item}", "timestamp": 1_600_000_000 + step * 90_000 + user}
            )
            item = (item + (1 if random.random() < 0.9 else int(random.integers(2, 5)))) % ITEMS
    log = pl.DataFrame(rows).unique(["user", "item"], keep="first", maintain_order=True)
    items = pl.DataFrame(
        {"item": [f"i{item}" for item in range(ITEMS)], "title": [f"thing {item}" for item in range(ITEMS)]}
    )
    users = pl.DataFrame({"user": [f"u{user}" for user in range(USERS)]})
    write_dataset(
        out, items=items.lazy(), interactions=log.lazy(), users=users.lazy(), source={"reader": "test"}
    )
    return Dataset.open(out)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    dataset = write_log(tmp_path_factory.mktemp("log") / "data")
    made = make_split(dataset, SplitOptions(dataset.folder, "loo"))
    make_candidates(made, CandidateOptions(made.folder, negatives=10))
    return made


@dataclass
class Done:
    """What a command left: status and words."""

    returncode: int
    stdout: str
    stderr: str


def recipe(split: Split, out: Path, *flags: str, ranker: str = "sasrec") -> list[str]:
    """Returns the recipe's arguments, with small defaults that flags override."""
    small = {"--epochs": "3", "--batch-size": "16", "--width": "16", "--learning-rate": "0.01"}
    defaults = [part for flag, value in small.items() if flag not in flags for part in (flag, value)]
    return ["--ranker", ranker, "--split", str(split.folder), "--out", str(out), *defaults, *flags]


def train(split: Split, out: Path, *flags: str, ranker: str = "sasrec") -> Done:
    """Runs the recipe in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            run_command(class_of_arguments, train_ranker_main(), recipe(split, out, *flags, ranker=ranker))
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Weights are equal to the bit between equal numbers of threads; processes that tests start have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_ranker_main() -> Any:
    """Returns the function of the script, which no module may import."""
    return runpy.run_path(SCRIPT, run_name="recipe")["main"]


def launched(processes: int, *arguments: str) -> Done:
    """Runs the recipe as a user would, in processes of its own."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    launcher += ["--config_file", "recipes/launch/cpu2.yaml", "--main_process_port", str(free_port())]
    start = launcher if processes > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*start, SCRIPT, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    return Done(done.returncode, done.stdout, done.stderr)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def farthest(run: Path, other: Path) -> float:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def trained(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sasrec"
    done = launched(1, *recipe(split, out, "--epochs", "12"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "recllm score ranker" in done.stdout
    return out


def test_a_run_learns_what_follows_what_and_says_what_it_was(split: Split, trained: Path):
    metrics, manifest = read_json(trained / "metrics.json", ""), read_json(trained / "manifest.json", "")
    assert metrics["valid"]["ndcg@10"] > 0.5  # by chance about .1
    assert manifest["status"] == "finished" and manifest["protocol"] == "loo"
    assert manifest["settings"]["width"] == 16 and manifest["data_hash"] == split.dataset.data_hash


def test_the_same_command_gives_the_same_weights_and_an_interrupted_run_too(
    split: Split, trained: Path, tmp_path: Path
):
    first = train(split, tmp_path / "a", "--epochs", "12", "--patience", "1000")
    part = train(split, tmp_path / "b", "--epochs", "5", "--patience", "1000")
    assert first.returncode == part.returncode == 0, first.stderr + part.stderr
    rest = train(split, tmp_path / "b", "--epochs", "12", "--patience", "1000", "--resume", "auto")
    assert rest.returncode == 0, rest.stderr
    assert farthest(tmp_path / "a", tmp_path / "b") == 0
    assert (
        read_json(tmp_path / "a" / "metrics.json", "")["valid"]
        == read_json(tmp_path / "b" / "metrics.json", "")["valid"]
    )
    lines = [(tmp_path / name / "log.jsonl").read_text().count("\n") for name in "ab"]
    assert lines == [12, 12]


def test_a_killed_run_goes_on_and_ends_as_one_that_was_left_alone(split: Split, tmp_path: Path):
    flags = ("--epochs", "40", "--patience", "1000")
    whole = train(split, tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, SCRIPT, *recipe(split, tmp_path / "cut", *flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "cut" / "last" / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    for flag in ("--resume=auto", "--overwrite"):
        beside = train(split, tmp_path / "cut", *flags, flag)
        assert beside.returncode == 1 and "another process trains in it" in beside.stderr
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert read_json(tmp_path / "cut" / "manifest.json", "")["status"] == "training"
    with pytest.raises(DataError, match=r"has not ended; --resume auto resumes it$"):
        load_run(tmp_path / "cut")
    rest = train(split, tmp_path / "cut", *flags, "--resume", "auto")
    assert rest.returncode == 0, rest.stderr
    assert farthest(tmp_path / "whole", tmp_path / "cut") == 0


@pytest.mark.parametrize("ranker", ["sasrec", "bpr"])
def test_two_processes_train_as_one_does(split: Split, ranker: str, tmp_path: Path):
    flags = ["--epochs", "3", "--batch-size", "15", "--seed", "5"]
    flags += ["--dropout", "0"] if ranker == "sasrec" else []
    one = train(split, tmp_path / "one", *flags, ranker=ranker)
    two = launched(2, *recipe(split, tmp_path / "two", *flags, ranker=ranker))
    assert one.returncode == two.returncode == 0, one.stderr[-2000:] + two.stderr[-2000:]
    assert farthest(tmp_path / "one", tmp_path / "two") < 2e-4
    ours, theirs = (read_json(tmp_path / name / "metrics.json", "")["valid"] for name in ("one", "two"))
    assert ours == pytest.approx(theirs, abs=0.02)
    assert two.stdout.count("epoch 1:") == 1  # rank 0 alone speaks


def test_runs_are_neither_lost_nor_mixed(split: Split, trained: Path, tmp_path: Path):
    again = train(split, trained)
    assert again.returncode == 1 and "--resume auto" in again.stderr and "Traceback" not in again.stderr
    other = train(split, trained, "--resume", "auto", "--width", "32")
    assert other.returncode == 1 and "width: 16 then, 32 now" in other.stderr
    kept = tmp_path / "kept"
    shutil.copytree(trained, kept)
    (kept / "report").mkdir()
    (kept / "report" / "manifest.json").write_text("{}")
    over = train(split, kept, "--overwrite")
    assert over.returncode == 1 and "kept holds report, made by other commands" in over.stderr
    assert (kept / "report").exists() and (kept / "metrics.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    foreign = train(split, tmp_path / "mine", "--overwrite")
    assert foreign.returncode == 1 and [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_scores_of_candidates_are_those_of_the_whole_catalog(split: Split, trained: Path, tmp_path: Path):
    recllm_main(
        ["score", "ranker", str(trained), "--out", str(tmp_path), "--candidates", "1+10-uniform-seed42"]
    )
    recllm_main(["score", "ranker", str(trained), "--out", str(tmp_path), "--top-k", "5"])
    scores = pl.read_parquet(tmp_path / "scores" / "sasrec.parquet")
    ranker, run, name = load_run(trained)
    assert name == "sasrec"
    ranking = full_ranking(split, "test")
    states = user_states(ranker, run.data, split, "test", ranking.users)
    matrix = states.states @ states.items.T
    user = {each: place for place, each in enumerate(ranking.user_ids)}
    item = {each: place for place, each in enumerate(ranking.item_ids)}
    expected = [matrix[user[row["user"]], item[row["item"]]].item() for row in scores.iter_rows(named=True)]
    assert np.allclose(scores["score"].to_numpy(), expected, atol=1e-5)
    records = RankRecords.load(tmp_path / "ranks" / "sasrec.parquet")
    seen = full_ranking(split, "test", mask="seen")
    for place in range(0, len(seen.users), 7):
        row = matrix[place].clone()
        row[seen.masked[seen.masked_offsets[place] : seen.masked_offsets[place + 1]]] = -torch.inf
        target = row[seen.positives[place]]
        assert records.above[place] == (row > target).sum()
    with pytest.raises(SystemExit):  # exists
        recllm_main(["score", "ranker", str(trained), "--out", str(tmp_path)])


def test_a_graph_ranker_knows_at_test_time_what_sequence_rankers_know(split: Split, tmp_path: Path):
    run = tmp_path / "lightgcn"
    assert train(split, run, ranker="lightgcn").returncode == 0

    def ranks(graph: str, part: str) -> RankRecords:
        out = tmp_path / f"{graph}-{part}"
        recllm_main(["score", "ranker", str(run), "--graph", graph, "--part", part, "--out", str(out)])
        return RankRecords.load(next((out / "ranks").iterdir()))

    of_training = load_run(run)[0]
    parts = [pl.read_parquet(split.folder / f"{part}.parquet") for part in ("train", "valid")]
    known = set(pl.concat([part.select("user", "item") for part in parts]).iter_rows())
    edges = known_pairs(load_run(run, known_before="test")[0])
    ids = [split.dataset.users["user"], split.dataset.items["item"]]
    assert {(ids[0][user], ids[1][item]) for user, item in edges} == known
    assert known_pairs(load_run(run, known_before="valid")[0]) == known_pairs(of_training) < edges
    assert np.array_equal(ranks("known", "valid").above, ranks("training", "valid").above)
    told = ranks("known", "test").above, ranks("training", "test").above
    assert not np.array_equal(*told)
    ranking = full_ranking(split, "test", mask="seen")
    users, items = (each.detach() for each in of_training.vectors())
    for place in range(0, len(ranking.users), 7):
        row = items @ users[ranking.users[place]]
        row[ranking.masked[ranking.masked_offsets[place] : ranking.masked_offsets[place + 1]]] = -torch.inf
        assert told[1][place] == (row > row[ranking.positives[place]]).sum()


@pytest.fixture(scope="module")
def split_by_user(split: Split) -> Split:
    """Whole users are held out, so that no validation or test user has a training interaction."""
    made = make_split(split.dataset, SplitOptions(split.dataset.folder, "users"))
    make_candidates(made, CandidateOptions(made.folder, negatives=10))
    return made


@pytest.mark.parametrize("ranker", ["bpr", "vbpr"])
def test_rankers_that_cannot_know_held_out_users_are_refused(split_by_user: Split, ranker: str, tmp_path):
    """They gave every item the same score and reported an AUC of .5 with best epoch 1."""
    done = train(split_by_user, tmp_path / "run", ranker=ranker)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "none of the 6 users with a valid target has a training interaction" in done.stderr
    assert "users-8:1:1" in done.stderr and "lightgcn" in done.stderr and "bpr," not in done.stderr


def test_a_graph_ranker_folds_held_out_users_in(split_by_user: Split, tmp_path: Path):
    """Item i is followed by i + 1, so that the history of a held-out user says where the target is near."""
    run = tmp_path / "lightgcn"
    done = train(split_by_user, run, "--epochs", "30", "--regularization", "0", ranker="lightgcn")
    assert done.returncode == 0, done.stderr
    lists = "1+10-uniform-seed42"
    recllm_main(["score", "ranker", str(run), "--candidates", lists, "--out", str(tmp_path)])
    recllm_main(["score", "ranker", str(run), "--out", str(tmp_path)])
    candidates = Candidates.read(split_by_user.folder / "candidates" / lists / "test.parquet")
    scored = read_system(tmp_path / "scores" / "lightgcn.parquet", candidates).records
    ranked = RankRecords.load(tmp_path / "ranks" / "lightgcn.parquet")
    assert (scored.tied == 1).all() and (ranked.tied == 1).all()
    assert compute_metrics(scored, names=["auc"]).mean()["auc"] > 0.75
    assert not ranked.all_tied


def test_a_result_whose_scores_all_tie_is_an_error(split: Split, trained: Path, tmp_path: Path):
    """In validation, in scores and in rank records: it would be reported as chance."""
    data = TrainingData.of(split)
    seed_weights(1)
    ranker = ranker_class("sasrec")(data, ranker_class("sasrec").Config(width=16))
    torch.nn.init.zeros_(ranker.items.weight)
    ranker.items.weight.requires_grad_(False)
    with pytest.raises(DataError, match=r"SASRec scores all items alike in each of the 60 validation lists"):
        fit(ranker, data, split, FitOptions(epochs=2, batch_size=16))

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    tensors = load_file(run / "model.safetensors")
    tensors["items.weight"].zero_()
    save_file(tensors, run / "model.safetensors")
    for flags in ([], ["--candidates", "1+10-uniform-seed42"]):
        with pytest.raises(SystemExit):
            recllm_main(["score", "ranker", str(run), *flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def known_pairs(ranker: torch.nn.Module) -> set[tuple[int, int]]:
    """Returns user and item of each edge of a ranker's graph of interactions."""
    starts, columns, _ = (each.numpy() for each in ranker.graph.rows)
    n_users = len(ranker.users.weight)
    owners = np.repeat(np.arange(len(starts) - 1), np.diff(starts))[: starts[n_users]]
    return set(zip(owners.tolist(), (columns[: starts[n_users]] - n_users).tolist(), strict=True))


def test_a_run_stands_in_the_report(split: Split, trained: Path, tmp_path: Path):
    recllm_main(["score", "ranker", str(trained), "--out", str(tmp_path)])
    files = [str(tmp_path / "ranks" / "sasrec.parquet"), str(trained)]
    recllm_main(["report", *files, "--dataset", str(split.dataset.folder), "--out", str(tmp_path / "report")])
    told = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert 'id="run-1"' in told and "epoch kept" in told


def test_nothing_of_the_test_part_reaches_training(
    split: Split, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training does without a file for the test part: its bytes are gone here, and the weights are equal."""
    folder = tmp_path / "other"
    shutil.copytree(split.dataset.folder, folder, ignore=shutil.ignore_patterns("splits"))
    dataset = Dataset.open(folder)
    made = make_split(dataset, SplitOptions(folder, "loo"))
    (made.folder / "test.parquet").write_bytes(b"")
    described = splits.describe_file
    told = read_json(made.folder / "manifest.json", "")["files"]["test.parquet"]
    monkeypatch.setattr(
        splits, "describe_file", lambda path: told if path.name == "test.parquet" else described(path)
    )
    done = train(made, tmp_path / "run", "--epochs", "12")
    assert done.returncode == 0, done.stderr
    assert farthest(trained, tmp_path / "run") == 0


def test_other_features_than_in_training_are_refused(split: Split, tmp_path: Path):
    vectors = np.random.default_rng(0).standard_normal((ITEMS, 6)).astype(np.float32)
    np.save(tmp_path / "text.npy", vectors)
    files = ("--text", str(tmp_path / "text.npy"), *ORDER)
    done = train(split, tmp_path / "run", *files, "--epochs", "1", ranker="unisrec")
    assert done.returncode == 0, done.stderr[-3000:]
    load_run(tmp_path / "run")
    vectors[0] += 1
    np.save(tmp_path / "text.npy", vectors)
    with pytest.raises(DataError, match="other text features"):
        load_run(tmp_path / "run")


def test_a_run_that_another_process_has_finished_meanwhile_is_kept(split: Split, tmp_path: Path):
    kind = options_class("gru4rec")
    options = kind(ranker="gru4rec", split=split.folder, out=tmp_path / "run", width=8, epochs=1)
    early = open_run(options)
    assert train(split, tmp_path / "run", "--epochs", "1", ranker="gru4rec").returncode == 0
    kept = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(DataError):
        begin_run(options, early)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == kept
    load_run(tmp_path / "run")


def test_a_finished_run_is_extended(split: Split, tmp_path: Path):
    whole = train(split, tmp_path / "whole", "--epochs", "4")
    part = train(split, tmp_path / "part", "--epochs", "2")
    again = train(split, tmp_path / "part", "--epochs", "2", "--resume", "auto")
    assert "is finished" in again.stdout
    more = train(split, tmp_path / "part", "--epochs", "4", "--resume", "auto")
    assert whole.returncode == part.returncode == more.returncode == 0, more.stderr
    assert farthest(tmp_path / "whole", tmp_path / "part") == 0


def test_a_run_may_move_with_its_split_and_features(split: Split, tmp_path: Path):
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float32))
    files = ("--text", str(tmp_path / "text.npy"), *ORDER)
    done = train(split, tmp_path / "run", *files, "--epochs", "1", ranker="unisrec")
    assert done.returncode == 0, done.stderr
    (tmp_path / "moved").mkdir()
    (tmp_path / "run").rename(tmp_path / "moved" / "run")
    (tmp_path / "text.npy").rename(tmp_path / "moved" / "text.npy")
    with pytest.raises(DataError, match="no such file"):
        load_run(tmp_path / "moved" / "run")
    moved = [
        "score",
        "ranker",
        str(tmp_path / "moved" / "run"),
        "--text",
        str(tmp_path / "moved" / "text.npy"),
    ]
    recllm_main([*moved, "--out", str(tmp_path)])
    assert (tmp_path / "ranks" / "run.parquet").is_file()


@pytest.mark.parametrize(
    "change",
    [{"settings": []}, {"settings": {"ranker": 5}}, {"features": []}, {"split_hash": None}, {"status": None}],
)
def test_a_damaged_manifest_is_told_in_a_line(split: Split, trained: Path, tmp_path: Path, change: dict):
    shutil.copytree(trained, tmp_path / "run")
    manifest = read_json(tmp_path / "run" / "manifest.json", "") | change
    write_json(tmp_path / "run" / "manifest.json", manifest)
    with pytest.raises(DataError):
        load_run(tmp_path / "run")


def test_a_start_that_fails_leaves_nothing_in_the_way(split: Split, tmp_path: Path):
    """A learning rate without bounds ends in a message; the next settings have the folder to themselves."""
    failed = train(split, tmp_path / "run", "--learning-rate", "1e30")
    assert failed.returncode == 1 and "smaller --learning-rate" in failed.stderr
    begun = train(split, tmp_path / "run", "--epochs", "1", "--width", "8")
    assert begun.returncode == 0, begun.stderr
    assert read_json(tmp_path / "run" / "manifest.json", "")["settings"]["width"] == 8
    load_run(tmp_path / "run")


def test_unisrec_reads_what_it_is_told_to(split: Split, tmp_path: Path):
    for name in ("text", "image"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float32))
    files = ["--text", str(tmp_path / "text.npy"), "--image", str(tmp_path / "image.npy"), *ORDER]
    for modalities in (["image"], ["text", "image"]):
        out = tmp_path / "-".join(modalities)
        done = train(split, out, "--modalities", *modalities, *files, "--epochs", "1", ranker="unisrec")
        assert done.returncode == 0, done.stderr
        assert set(load_run(out)[1].data.features) == set(modalities)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "4 gradient accumulation steps"),
    ],
)
def test_launches_that_rankers_cannot_be_trained_under_are_refused_first(
    split: Split, environment: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = train(split, tmp_path / "run", "--text", "nowhere", ranker="unisrec")  # which is not looked for
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert message in done.stderr and "Traceback" not in done.stderr
    data = TrainingData.of(split)
    with pytest.raises(DataError, match=message):
        fit(ranker_class("bert4rec")(data), data, split, FitOptions(epochs=1))


def test_data_without_times_is_refused_before_anything_is_embedded(tmp_path: Path):
    """HM4SR used to embed the whole catalog first."""
    untimed = tiny_split(tmp_path / "data", timed=False)
    for flags in ((), ("--image", "nowhere.npy", "--text", "nowhere")):
        done = train(untimed, tmp_path / "run", *flags, ranker="hm4sr")
        assert done.returncode != 0 and "HM4SR needs the times of interactions" in done.stderr
    timed = tiny_split(tmp_path / "timed")
    done = train(timed, tmp_path / "run", ranker="hm4sr")
    assert done.returncode != 0 and "give --image" in done.stderr
    assert not (timed.dataset.folder / "embeddings").exists()


def test_zero_is_refused_in_a_line(split: Split, tmp_path: Path):
    """`accelerate launch --config_file recipes/launch/zero2.yaml` ended in a traceback of accelerate's."""
    pytest.importorskip("deepspeed")
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    launcher += ["--config_file", "recipes/launch/zero2.yaml", "--num_processes", "1"]
    launcher += ["--main_process_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, SCRIPT, *recipe(split, tmp_path / "run")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "error: rankers are not trained with DeepSpeed" in done.stderr


def test_damaged_weights_and_foreign_folders_are_refused(split: Split, trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="safetensors"):
        load_run(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no such file"):
        load_run(run)
    with pytest.raises(DataError):
        load_run(split.folder)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--ranker", "sasrek"], "sasrec"),
        ([], "--ranker is missing"),
        (["--ranker", "sasrec"], "--split is missing"),
        (["--ranker", "sasrec", "--loss", "bpr", "--negatives", "0", "--split", "SPLIT"], "--negatives 0"),
        (["--ranker", "bert4rec", "--loss", "bpr", "--split", "SPLIT"], "BERT4Rec takes ce"),
        (["--ranker", "sasrec", "--split", "nowhere"], "nowhere"),
        (["--ranker", "sasrec", "--heads", "5", "--split", "SPLIT"], "multiple of --heads 5"),
        (["--ranker", "sasrec", "--dropout", "1.5", "--split", "SPLIT"], "--dropout 1.5"),
        (["--ranker", "sasrec", "--layers", "0", "--split", "SPLIT"], "--layers 0"),
        (["--ranker", "sasrec", "--length", "0", "--split", "SPLIT"], "--length 0"),
        (["--ranker", "lightgcn", "--regularization", "-1", "--split", "SPLIT"], "--regularization -1"),
        (["--ranker", "sasrec", "--loss", "gbce", "--negatives", "500", "--split", "SPLIT"], "of 40 items"),
        (["--ranker", "lattice", "--split", "SPLIT"], "give --image"),
        (["--ranker", "freedom", "--threshold", "0.4", "--split", "SPLIT"], "without --refine"),
        (["--ranker", "smore", "--refine", "--threshold", "1.5", "--split", "SPLIT"], "1 at most"),
        (["--ranker", "hm4sr", "--image", "none", "--split", "SPLIT"], "--image"),
        (["--ranker", "unisrec", *ORDER, "--split", "SPLIT"], "unisrec reads --text catalog; leave the"),
        (["--ranker", "sasrec", *ORDER, "--split", "SPLIT"], "sasrec reads no features; leave the"),
    ],
)
def test_options_that_cannot_work_are_told_in_a_line(
    split: Split,
    flags: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    flags = [str(split.folder) if flag == "SPLIT" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run_command(class_of_arguments, train_ranker_main(), flags)
    assert not (tmp_path / "runs").exists()
    assert stop.value.code == 1
    assert told in capsys.readouterr().err


def test_every_ranker_has_a_recipe_whose_options_are_its_own():
    names = {Path(name).stem for name in recipe_names() if name.startswith("configs/rankers/")}
    assert names == set(RANKERS)
    for name in RANKERS:
        path = recipe_path(f"configs/rankers/{name}.yaml")
        kind = class_of_arguments(["--config", str(path)])
        options = parse_config(kind, ["--config", str(path)])
        assert options.ranker == name and isinstance(options, TrainRankerOptions)
        options.check(ranker_class(name), 1000)
        assert all(f"\n{each.name}:" in path.read_text() for each in fields(ranker_class(name).Config))
        assert options.config() == ranker_class(name).Config(), f"{path} and the defaults disagree"
        (command,) = (
            line[1:].strip() for line in path.read_text().splitlines() if "accelerate launch" in line
        )
        words = shlex.split(command)
        assert words[4] == "recipes/train_ranker.py" and (ROOT / words[3]).is_file()
        assert ROOT / words[words.index("--config") + 1] == path
        given = parse_config(class_of_arguments(words[5:]), words[5:])
        assert (given.image is not None) == ("image" in ranker_class(name).modalities)


def test_the_options_of_a_ranker_are_flags_with_their_help(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        parse_config(options_class("stosa"), ["--help"])
    shown = capsys.readouterr().out
    assert "--positive-negative-weight" in shown and "--learning-rate" in shown


def test_some_lists_are_those_lists(split: Split):
    ranking = full_ranking(split, "valid")
    places = np.array([5, 0, 17])
    some = some_lists(ranking, places)

    def lists(each: Any, place: int) -> tuple[Any, ...]:
        return (
            each.users[place],
            each.user_ids[place],
            each.positives[each.positive_offsets[place] : each.positive_offsets[place + 1]].tolist(),
            each.masked[each.masked_offsets[place] : each.masked_offsets[place + 1]].tolist(),
        )

    assert [lists(some, number) for number in range(3)] == [lists(ranking, int(place)) for place in places]

"""Scores rows, and is killed as it goes: `killed_job.py MODEL FOLDER OUT KILLS`; tests start it.

The model is loaded once, and nothing else is done before a fork, which no thread would survive. Each attempt
is a fork that SIGKILL ends at its second batch: before its scores are written, in the middle of the line, or
right after. The last attempt, which is not a fork, is left alone.
"""

import os
import signal
import sys
from pathlib import Path

import polars as pl
import torch

from recllm.mllm import load
from recllm.mllm.scoring import YesNoScorer
from recllm.mllm.scoring import shards as shards_module
from recllm.mllm.scoring.job import score_into
from recllm.mllm.scoring.shards import ShardAppender

BATCH = 250
JOB = {"instructions": "those of the test"}
METADATA = {"recllm.protocol": "test/5", "recllm.system": "small"}


def score(scorer: YesNoScorer, folder: Path, out: Path):
    rows = pl.read_parquet(folder / "rows.parquet")
    return score_into(scorer, rows, folder, out, job=JOB, metadata=METADATA)


def die_at_second_batch(how: int) -> None:
    append, batches = ShardAppender.append, iter(range(1000))

    def append_and_die(self, scored):
        if next(batches) == 0:
            append(self, scored)
            return
        if how == 1:
            line = shards_module._encode(scored)
            os.write(self._descriptor, line[: len(line) // 2])
        if how == 2:
            append(self, scored)
        os.kill(os.getpid(), signal.SIGKILL)

    ShardAppender.append = append_and_die


def main() -> None:
    model, folder, out = map(Path, sys.argv[1:4])
    scorer = YesNoScorer(load(model), yes=("y",), no=("n",), batch_tokens=BATCH)
    for attempt in range(int(sys.argv[4])):
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # renews the pool that a fork broke: two threads that do so at once fail
            die_at_second_batch(attempt % 3)
            score(scorer, folder, out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"attempt {attempt} was not killed"
        assert not out.exists()
    print(score(scorer, folder, out))


if __name__ == "__main__":
    main()

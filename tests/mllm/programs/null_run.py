"""Generates with a null model and writes the texts: `null_run.py FOLDER`; tests start and kill it."""

import argparse
import os
import signal
import time
from pathlib import Path

from recllm import processes
from recllm.mllm.chat import Decoding, Request, Result, message
from recllm.mllm.generation.run import generate
from recllm.mllm.store import GenerationStore


class NullModel:
    """Answers from the key alone; logs every key before it yields its result."""

    special_tokens = ()

    def __init__(self, log, seconds, dies_after):
        self.identity = {"model": "null"}
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.seconds, self.left = seconds, dies_after

    def generate(self, requests, decoding):
        for start in range(0, len(requests), 4):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
            batch = requests[start : start + 4]
            os.write(self.log, "".join(f"{key.hex()}\n" for key, _ in batch).encode())
            yield [answer(key) for key, _ in batch]

    def count_tokens(self, request):
        return 1


def answer(key):
    if key[0] < 8:
        return Result.failed(key, f"server: refused {key.hex()[:4]}")
    return Result(key, f"text of {key.hex()}\nend", 7, key[1], "stop")


def requests(count):
    """As many requests, of which every tenth has the content of the one before."""
    for number in range(count):
        content = number - 1 if number % 10 == 9 else number
        yield Request(f"item {number}", (message("user", f"Describe item {content}."),))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--slow-rank", type=int, default=-1)
    parser.add_argument("--dying-rank", type=int, default=-1)
    options = parser.parse_args()
    mine = processes.rank()
    seconds = 0.05 if mine == options.slow_rank else options.seconds
    model = NullModel(options.folder / "log", seconds, 3 if mine == options.dying_rank else None)
    store = GenerationStore.open(options.folder / "store")
    os.write(model.log, b"started\n")
    generated = generate(requests(options.count), model, store, Decoding(), window=64)
    if mine == 0:
        from recllm.mllm.generation.texts import write_texts

        write_texts(
            options.folder / "texts.parquet",
            generated,
            id_name="item",
            metadata={"model": "null"},
            extra={"number": range(len(generated))},
        )


if __name__ == "__main__":
    main()

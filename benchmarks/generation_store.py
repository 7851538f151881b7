"""What the run loop and the generation store cost: with a model that takes no time, and beside a real one.

    python benchmarks/generation_store.py

First the whole of `generate` (keys, look-ups, durable lines, counts) with a null model, by the number of
requests: requests per second must stay flat, memory must grow by some hundred bytes a request; then the same
requests again, now all from the store, and the reading of the results. One request tells what a run costs
whatever its size, which is mostly waiting for the disk. Each size runs in its own process; rounds are
interleaved, figures are medians.

Then beside a model, paired in one process: `generate` into a new store against bare `model.generate` on the
very batches that it made, and against the backend alone, without store. The model has random weights (8
layers of width 512); the embedded one, which answers a request in about 3 ms, shows the worst case.
"""

import copy
import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path

from recllm.files import write_json
from recllm.mllm.chat import Decoding, Request, Result, message
from recllm.runs.provenance import describe_machine, describe_run

RESULTS = Path(__file__).parent.parent / "results" / "generation_store.json"
SIZES, ROUNDS, BATCH = (1, 1_000, 10_000, 100_000), 5, 32
PROMPT = "Please combine visual summary and text to summarize the item number {0}. " * 8
ANSWER = "A red striped cup with a handle, made of china, for tea or coffee. " * 4


class NullModel:
    """Answers at once."""

    special_tokens = ()

    def __init__(self):
        self.identity = {"model": "null", "revision": "0"}

    def generate(self, requests, decoding):
        for start in range(0, len(requests), BATCH):
            yield [Result(key, ANSWER, 120, 60, "stop") for key, _ in requests[start : start + BATCH]]

    def count_tokens(self, request):
        return None


def stream(count):
    return (Request(str(number), (message("user", PROMPT.format(number)),)) for number in range(count))


# ----------------------------------------------------------------------------------- with a model of no time


def serve(count, pipe):
    """Runs once for every message, into a new store."""
    from recllm.mllm.generation.run import generate
    from recllm.mllm.store import GenerationStore

    while pipe.recv():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as folder:
            clock = [time.perf_counter()]
            generate(stream(count), NullModel(), GenerationStore.open(Path(folder, "s")), Decoding())
            clock.append(time.perf_counter())
            store = GenerationStore.open(Path(folder, "s"))
            generated = generate(stream(count), NullModel(), store, Decoding())
            clock.append(time.perf_counter())
            assert sum(result.text == ANSWER for _, result in generated.results()) == count
            clock.append(time.perf_counter())
            assert (generated.counts.stored, generated.counts.generated) == (count, 0)
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        pipe.send((*(end - start for start, end in itertools.pairwise(clock)), peak))


def by_size():
    """Returns a line of figures for each size."""
    context = multiprocessing.get_context("spawn")
    pipes, runs = {}, {count: [] for count in SIZES}
    for count in SIZES:
        pipes[count], theirs = context.Pipe()
        context.Process(target=serve, args=(count, theirs), daemon=True).start()
    for _ in range(ROUNDS):
        for count, pipe in pipes.items():
            pipe.send(True)
            runs[count].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    figures = []
    for count, rounds in runs.items():
        new, again, read = (statistics.median(seconds) for seconds in list(zip(*rounds, strict=True))[:3])
        figures.append(
            {
                "requests": count,
                "seconds": new,
                "requests_per_second": count / new,
                "stored_per_second": count / again,
                "read_per_second": count / read,
                "peak_mib": max(one[3] for one in rounds),  # what the first round needs, later ones reuse
            }
        )
        print(*(f"{key} {value:,.3f}" for key, value in figures[-1].items()), sep="  ", flush=True)
    return figures


# -------------------------------------------------------------------------------------- beside a real model


def beside_a_random_model():
    """Runs `beside_a_model` on random weights of a size that is still quick to run on a CPU."""
    from recllm.mllm.tiny import Shape, build_random

    shape = Shape(layers=8, hidden=512, intermediate=1408, heads=8, kv_heads=4, rope_sections=(8, 12, 12))
    with tempfile.TemporaryDirectory() as folder:
        return beside_a_model(build_random(shape, Path(folder, "model")), 48, 9, 64)


def beside_a_model(name, count, rounds, length):
    """Returns the seconds of three ways to answer the same requests, medians, and their ratios."""
    import torch

    from recllm.data.image_hashes import ImageHashes
    from recllm.mllm.generation.in_process import InProcessBackend
    from recllm.mllm.generation.run import generate
    from recllm.mllm.loading import load
    from recllm.mllm.store import GenerationStore, request_key

    loaded = load(name, dtype="float32")
    backend, decoding, hashes = InProcessBackend(loaded), Decoding(max_new_tokens=length), ImageHashes()
    requests = list(stream(count))
    pairs = [(request_key(backend.identity, decoding, request, hashes), request) for request in requests]
    batches, model_generate = [], loaded.base_model.generate

    def recording(**options):
        batches.append({**options, "generation_config": copy.deepcopy(options["generation_config"])})
        return model_generate(**options)

    loaded.base_model.generate = recording
    alone = [result for results in backend.generate(pairs, decoding) for result in results]
    del loaded.base_model.generate  # the method of the class stands behind it again

    def bare():
        with torch.inference_mode():
            for options in batches:
                model_generate(**options)

    def without_store():
        for _ in backend.generate(pairs, decoding):
            pass

    def with_store():
        with tempfile.TemporaryDirectory() as folder:
            generated = generate(requests, backend, GenerationStore.open(Path(folder, "s")), decoding)
            texts = {result.key: result.text for _, result in generated.results()}
        assert texts == {result.key: result.text for result in alone}

    ways = {"bare model.generate": bare, "backend": without_store, "generate": with_store}
    runs = {way: [] for way in ways}
    for _ in range(rounds):
        for way, function in ways.items():
            started = time.perf_counter()
            function()
            runs[way].append(time.perf_counter() - started)
    figures = {way: {"seconds": statistics.median(seconds)} for way, seconds in runs.items()}
    for way, seconds in runs.items():
        pairs_of_rounds = zip(seconds, runs["bare model.generate"], strict=True)
        figures[way]["ratio"] = statistics.median(mine / base for mine, base in pairs_of_rounds)
        print(f"{way:20}", *(f"{key} {value:.4f}" for key, value in figures[way].items()), sep="  ")
    parameters = sum(each.numel() for each in loaded.model.parameters())
    return {
        "parameters": parameters,
        "requests": count,
        "max_new_tokens": length,
        "batches": len(batches),
        "ways": figures,
    }


def main() -> None:
    figures = {
        "by_size": by_size(),
        "beside_a_model": {
            "random": beside_a_random_model(),
            "embedded": beside_a_model("tiny", 256, 7, 64),
        },
    }
    content = {
        "benchmark": "generation_store",
        "machine": describe_machine(),
        "run": describe_run(),
        "setting": {"rounds": ROUNDS, "null_batch": BATCH},
        "figures": figures,
    }
    write_json(RESULTS, content)


if __name__ == "__main__":
    main()

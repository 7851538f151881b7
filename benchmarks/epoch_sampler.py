"""How long a training run waits for the order of its rows: `EpochSampler` on a memory-mapped dataset.

    python benchmarks/epoch_sampler.py --rows 100000 --out results/epoch_sampler.json

Run it on two versions of the code to compare them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run


def main() -> None:
    """Writes a dataset in tokens, opens it, and times the sampler."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    from datasets import Dataset, disable_progress_bars

    from recllm.training.sampling import EpochSampler

    disable_progress_bars()
    numbers = np.arange(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        Dataset.from_dict({"group": numbers // 4, "length": numbers % 97 + 3}).save_to_disk(folder)
        rows = Dataset.load_from_disk(folder)
        began = time.perf_counter()
        sampler = EpochSampler(rows["group"], 32, 0, rows["length"])
        seconds = time.perf_counter() - began
    figures = {"rows": len(sampler), "seconds": round(seconds, 3)}
    print(figures)
    if options.out is not None:
        write_json(options.out, {"run": describe_run(), "machine": describe_machine(), "figures": figures})


if __name__ == "__main__":
    main()

"""How long a training run waits for the order of its rows: `EpochSampler` on a memory-mapped dataset.

    python benchmarks/epoch_sampler.py --rows 100000 --out results/epoch_sampler.json

Run it on two versions of the code to compare them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from recllm.runs import describe_machine, describe_run


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
    result = {
        "command": " ".join(["python", *sys.argv]),
        "rows": len(sampler),
        "seconds": round(seconds, 3),
        "machine": describe_machine(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "run": describe_run(),
    }
    print(json.dumps({name: result[name] for name in ("rows", "seconds", "cpu_instructions")}))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

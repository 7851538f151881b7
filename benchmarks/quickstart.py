"""How long `recllm quickstart` takes from an empty folder, step by step, and as on a CPU with AVX2 alone.

    python benchmarks/quickstart.py WORK --out results/quickstart.json

WORK must be new. The second run sets `ATEN_CPU_CAPABILITY=avx2` and `ONEDNN_MAX_CPU_ISA=AVX2`, which take
AVX-512 and bfloat16 from torch and oneDNN; MKL and bitsandbytes still find them. Seconds are wall time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from recllm.files import read_json, write_json
from recllm.runs.provenance import describe_run

WAYS = {"as it is": {}, "AVX2 alone": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
MACHINE = "from recllm.runs.provenance import describe_machine; print(describe_machine())"


def measure(folder: Path, variables: dict[str, str]) -> dict[str, object]:
    """Runs the quickstart and returns its machine, seconds of each step, and AUC."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    machine = subprocess.run(
        [sys.executable, "-c", MACHINE], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()
    command = [sys.executable, "-m", "recllm.cli", "quickstart", str(folder)]
    lines, steps, step = [], {}, ""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            if found := re.match(r"== \d+/\d+ (.*)", line):
                step = found[1]
            elif found := re.match(r"\((\d+) s; \d+ s in all\)", line):
                steps[step] = int(found[1])
    if process.returncode:
        raise SystemExit(f"the quickstart failed with status {process.returncode}")
    metrics = read_json(folder / "metrics" / "metrics.json", "the quickstart's metrics")
    auc = {row["system"]: round(row["value"], 4) for row in metrics["figures"] if row["metric"] == "auc"}
    return {"machine": machine, "seconds": sum(steps.values()), "steps": steps, "auc": auc}


def main() -> None:
    """Measures each way once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    figures = {}
    for way, variables in WAYS.items():
        figures[way] = measure(options.work / way.replace(" ", "-"), variables)
        if options.out is not None:
            run = describe_run()
            run["command"] = ["quickstart.py", "WORK", "--out", str(options.out)]
            machine = figures["as it is"]["machine"]
            write_json(options.out, {"run": run, "machine": machine, "figures": figures})


if __name__ == "__main__":
    main()

"""How much slower training gets beside other work on the same cores, by what waiting threads do.

    python benchmarks/beside_other_work.py --out results/beside_other_work.json

A step trains a small feed-forward network on all cores, once alone and once beside one busy loop for each
core. An ideal scheduler would make it twice as slow. By default OpenMP's threads spin at barriers, while the
thread that they wait for has no core; recllm sets `GOMP_SPINCOUNT=20000` (see `recllm/__init__.py`). Ways
alternate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from recllm.files import write_json
from recllm.runs.provenance import describe_machine, describe_run

WAYS = {
    "threads that spin (the default)": {},
    "threads that soon sleep (recllm)": {"GOMP_SPINCOUNT": "20000"},
}
STEPS = """
import sys, time, torch
torch.manual_seed(0)
layers = [torch.nn.Linear(128, 384), torch.nn.GELU(), torch.nn.Linear(384, 128)] * 4
model, rows = torch.nn.Sequential(*layers), torch.randn(2000, 128)
def step():
    model(rows).square().mean().backward()
step()
count, started = 0, time.perf_counter()
while time.perf_counter() - started < float(sys.argv[1]):
    step()
    count += 1
print(count / (time.perf_counter() - started))
"""


def steps_a_second(variables: dict[str, str], seconds: float) -> float:
    """Runs the steps in a process of their own."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    }
    command = [sys.executable, "-c", STEPS, str(seconds)]
    told = subprocess.run(command, env=environment | variables, check=True, capture_output=True, text=True)
    return float(told.stdout)


def main() -> None:
    """Measures both ways, alone and beside busy loops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rates: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in WAYS}
    for _ in range(options.rounds):
        for name, variables in WAYS.items():
            rates[name]["alone"].append(steps_a_second(variables, options.seconds))
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
        try:
            for name, variables in WAYS.items():
                rates[name]["beside"].append(steps_a_second(variables, options.seconds))
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
    figures = {}
    for name, measured in rates.items():
        alone, beside = (statistics.median(measured[where]) for where in ("alone", "beside"))
        figures[name] = {
            "steps_a_second_alone": round(alone, 1),
            "steps_a_second_beside": round(beside, 2),
            "times_slower": round(alone / beside, 2),
        }
        print(f"{name}: {alone:.1f} steps a second alone, {beside:.2f} beside: {alone / beside:.1f} x slower")
    if options.out is not None:
        content = {"run": describe_run(), "machine": describe_machine(), "busy_loops": cores}
        content["figures"] = figures
        write_json(options.out, content)


if __name__ == "__main__":
    main()

"""The wheel ships recllm alone, lower rooms never import upper ones, scripts are thin."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import recllm

ROOT = Path(__file__).parents[1]
# Each room of the house, and the rooms that it may import from.
ROOMS = {
    "runs": (),
    "prompts": (),
    "data": ("runs",),
    "evaluation": ("data",),
    "graphs": ("data",),
    "mllm": ("data", "prompts", "runs"),
    "rankers": ("data", "evaluation", "graphs", "mllm", "runs"),
    "retrieval": ("data", "evaluation", "mllm", "rankers"),
    "builders": ("data", "evaluation", "prompts", "mllm", "runs"),
    "training": ("data", "evaluation", "prompts", "mllm", "builders", "runs"),
    "report": ("data", "evaluation", "runs"),
    "reveal": ("builders", "data", "evaluation", "mllm", "prompts", "rankers", "runs"),
}


def test_the_wheel_holds_the_package_alone_and_its_command(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        points = archive.read(f"recllm-{recllm.__version__}.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"recllm"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "recllm").rglob("*.py")}
    assert modules <= set(names)
    model = {str(path.relative_to(ROOT)) for path in (ROOT / "recllm/mllm/tiny/checkpoint").iterdir()}
    assert "recllm/mllm/tiny/checkpoint/model.safetensors" in model
    assert model <= set(names)
    assert "recllm = recllm.cli:main" in points
    assert any(name.endswith("licenses/LICENSE") for name in names)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_rooms_import_only_from_the_rooms_below_them():
    checked = 0
    folders = {path.parent.name for path in (ROOT / "recllm").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    for room, below in ROOMS.items():
        others = {f"recllm.{name}" for name in ROOMS if name != room and name not in below}
        for path in (ROOT / "recllm" / room).rglob("*.py"):
            wrong = {name for name in imports(path) if ".".join(name.split(".")[:2]) in others}
            assert not wrong, f"{path} imports {wrong}"
            checked += 1
    assert checked > 60


def test_scripts_are_thin_and_imported_by_nothing():
    scripts = [
        path for folder in ("data_builders", "eval", "recipes") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(scripts) >= 3
    names = {path.stem for path in scripts}
    for path in scripts:
        assert len(path.read_text().splitlines()) <= 150
    for path in (ROOT / "recllm").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & (
            names | {"data_builders", "eval", "recipes", "benchmarks"}
        )


def test_no_script_or_folder_is_named_after_a_dependency():
    taken = {"evaluate", "datasets", "trl", "accelerate", "peft", "torch", "transformers", "polars", "numpy"}
    found = {
        path.stem
        for folder in ("data_builders", "eval", "recipes", "benchmarks")
        for path in (ROOT / folder).iterdir()
    }
    assert not found & taken


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_soon_sleep_unless_the_user_decides(given: dict[str, str], expected: str) -> None:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    program = (
        "import sys, recllm, os; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    assert told.stdout.strip() == expected

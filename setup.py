"""Puts recipes/ into the wheel as data of recllm; everything else stands in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Copies the recipes beside the modules; an editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "recllm" / "recipes"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree(
                Path(__file__).parent / "recipes", target, ignore=shutil.ignore_patterns("__pycache__")
            )


setup(cmdclass={"build_py": BuildWithRecipes})

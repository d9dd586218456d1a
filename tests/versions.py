"""The lean tests with other versions than those installed: `python -m tests.versions`.

The oldest versions that pyproject.toml allows, on this Python; and the newest, on every other Python that it
allows and that is found. Each gets an environment of its own in build/versions, from a package index. None of
them has PyTorch: tests that import what is not there, or need another bundle than the tiny one, are left out,
and counted.

Lean is what `pip install '.[cpu]'` installs. This module is also the plugin of pytest that leaves tests out.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "versions"
BUNDLE = FOLDER / "tiny"
TESTS = ("tests/engines", "tests/runtime")
OTHER_BUNDLES = ("_checkpoint", "_bundle")
"""How the names of fixtures end that need PyTorch; the tiny bundle is made before."""


def main() -> int:
    """Runs the tests in every environment; returns the exit code, 1 if one of them failed."""
    oldest, newest = requirements()
    build_tiny_bundle()
    codes = [run("oldest versions", sys.executable, oldest)]
    here = sys.version_info[:2]
    for minor in range(10, 14):
        if (3, minor) != here:
            python = find_python(f"3.{minor}")
            if python:
                codes.append(run("newest versions", python, newest))
            else:
                print(f"Python 3.{minor}: skipped, it is not found", flush=True)
    return int(any(codes))


def requirements() -> tuple[list[str], list[str]]:
    """What the lean runtime needs: in the oldest versions, and as pyproject.toml says it."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    newest: list[str] = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    return [requirement.replace(">=", "==") for requirement in newest], newest


def find_python(version: str) -> str | None:
    """A working interpreter of a version, on the path or among those of pyenv."""
    beside = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    for python in filter(None, (shutil.which(f"python{version}"), *map(str, beside))):
        done = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
        if done.stdout.startswith(f"Python {version}."):
            return python
    return None


def run(what: str, python: str, packages: list[str]) -> int:
    """Runs the tests in an environment of their own; returns the exit code, 0 if that cannot be made."""
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    folder = FOLDER / re.sub(r"\W+", "-", f"{version} {what}")
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
    done = subprocess.run([*pip, *packages, "pytest>=8", "hypothesis>=6.100"], check=False)
    if done.returncode:
        print(f"{version}, {what}: skipped, {', '.join(packages)} cannot be installed", flush=True)
        return 0
    print(f"{version}, {what}: {', '.join(packages)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [folder / "bin" / "python", "-m", "pytest", "-p", "tests.versions", *TESTS]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def build_tiny_bundle() -> None:
    """Makes the bundle that the tests run."""
    from benchmarks.seeded import ARCHITECTURES, seeded_checkpoint
    from export.build import build_bundle
    from export.options import BuildOptions
    from export.progress import Progress
    from export.systems import open_source

    checkpoint = FOLDER / "tiny.safetensors"
    FOLDER.mkdir(parents=True, exist_ok=True)
    seeded_checkpoint(checkpoint, ARCHITECTURES["tiny"], seed=0)
    build_bundle(open_source(checkpoint), BUNDLE, BuildOptions(resolution=64), Progress(quiet=True))


# --- the plugin -------------------------------------------------------------------------------------------

left_out: dict[str, list[str]] = {}
"""Package -> test files and folders that need it."""


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leaves out files, and folders whose conftest.py, import what is not installed."""
    file = collection_path / "conftest.py" if collection_path.is_dir() else collection_path
    if file.suffix != ".py" or not file.is_file():
        return None
    for package in sorted(packages_of(file)):
        if package not in sys.stdlib_module_names and find_spec(package) is None:
            left_out.setdefault(package, []).append(str(collection_path))
            return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Leaves out tests that need another bundle."""
    others = [item for item in items if any(map(_needs_pytorch, getattr(item, "fixturenames", ())))]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)


def _needs_pytorch(fixture: str) -> bool:
    return fixture != "tiny_bundle" and fixture.endswith(OTHER_BUNDLES)


def pytest_fixture_setup(fixturedef: Any, request: Any) -> Path | None:
    """Gives the tiny bundle that was made before."""
    if fixturedef.argname != "tiny_bundle":
        return None
    fixturedef.cached_result = (BUNDLE, fixturedef.cache_key(request), None)
    return BUNDLE


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says which files were left out."""
    for package, files in left_out.items():
        terminalreporter.write_line(
            f"left out, because {package} is not installed: {len(files)} files or folders"
        )


@cache
def packages_of(path: Path) -> frozenset[str]:
    """The packages of others that a file imports when it is imported, itself or through our modules."""
    found: set[str] = set()
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        seen.add(file)
        for module in imports_of(file):
            ours = [ROOT / f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py")]
            there = [place for place in ours if place.is_file()]
            waiting += [place for place in there if place not in seen]
            if not there and not (ROOT / module.split(".")[0]).is_dir():
                found.add(module.split(".")[0])
    return frozenset(found)


def imports_of(file: Path) -> list[str]:
    """The modules that a file names in import statements outside of functions and of TYPE_CHECKING."""
    modules: list[str] = []
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


if __name__ == "__main__":
    sys.exit(main())

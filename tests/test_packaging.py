"""What `pip install .` installs: what serving, building and training need, and no benchmarks or tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest

from runtime.cli import BUILT_IN, GROUP

ROOT = Path(__file__).parents[1]
STUDIO = "runtime/server/http/studio"
FOLDERS = ("engines", "runtime", "export", "training", "benchmarks", "tests", "examples")
FILES = ("pyproject.toml", "README.md", "LICENSE", "anydoor_command.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, because setuptools leaves its own folders beside what it builds."""
    pytest.importorskip("setuptools", "77", reason="needs pip install '.[dev]'")
    clone = tmp_path_factory.mktemp("clone")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__", "*.data"))
    for file in FILES:
        shutil.copy(ROOT / file, clone)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."],
        cwd=clone,
        check=True,
    )
    return zipfile.ZipFile(next(clone.glob("*.whl")))


def test_it_holds_the_four_packages_and_the_command(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info" not in name}
    assert tops == {"engines", "runtime", "export", "training", "anydoor_command.py"}


def test_it_holds_every_module_and_recipe(wheel: zipfile.ZipFile) -> None:
    folders = ("engines", "runtime", "export", "training")
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    recipes = list((ROOT / "training" / "recipes").glob("*.toml"))
    assert recipes
    wanted = {path.relative_to(ROOT).as_posix() for path in (*modules, *recipes)}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / STUDIO).iterdir()}
    wanted |= {"engines/py.typed", "runtime/py.typed"}  # applications see the types
    assert not wanted - set(wheel.namelist())


def test_the_command_and_its_subcommands_are_found(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entries = ConfigParser()
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["console_scripts"]) == {"anydoor": "anydoor_command:main"}
    assert dict(entries[GROUP]) == {command: module for command, (module, _) in BUILT_IN.items()}
    assert all(find_spec(module) for module in entries[GROUP].values())


def test_the_installed_command_runs_from_anywhere(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Unpacked as pip does it, with the shipped packages of this environment and without this clone."""
    wheel.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path = [path for path in sys.path if path not in ('', sys.argv[1])];"
        "sys.path.insert(0, sys.argv[2]); sys.argv[1:] = ['--help']; import anydoor_command;"
        "anydoor_command.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path / "site")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(command in result.stdout for command in BUILT_IN)

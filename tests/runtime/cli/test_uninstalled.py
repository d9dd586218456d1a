"""The commands in a clone where nothing is installed, not even NumPy: one sentence on what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Git would bring; an installation leaves its metadata in the clone it is made from."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("engines", "runtime", "export", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "anydoor_command.py", folder)
    return folder


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python without the packages of this environment."""
    command = [sys.executable, "-S", "-E", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_doctor_says_what_is_missing(clone: Path) -> None:
    result = python("-m", "runtime", "doctor", cwd=clone)
    assert result.returncode == 2
    assert "anydoor-runtime 0+unknown" in result.stdout
    assert "  numpy            -            required\n" in result.stdout
    assert result.stderr == "anydoor: the package 'numpy' is missing; install it with: pip install '.[cpu]'\n"


@pytest.mark.parametrize(
    ("command", "package", "extras"),
    [
        ("composite", "numpy", "cpu"),
        ("draw", "numpy", "cpu"),
        ("serve", "numpy", "cpu,serve"),
        ("build", "numpy", "export"),
    ],
)
def test_commands_name_the_extras_that_they_need(
    clone: Path, command: str, package: str, extras: str
) -> None:
    result = python("-m", "runtime", command, "--help", cwd=clone)
    assert result.returncode == 2
    sentence = f"anydoor: the package '{package}' is missing; install it with: pip install '.[{extras}]'\n"
    assert result.stderr == sentence


def test_the_build_script_says_what_to_run(clone: Path) -> None:
    result = python("export/build_engines.py", "anydoor.safetensors", cwd=clone)
    assert result.returncode == 2
    assert result.stderr.startswith(
        "build_engines.py: the package 'engines' is missing: run 'make dev', then "
    )
    assert len(result.stderr.splitlines()) == 1

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from runtime.version import version

RUNTIME = Path(__file__).parents[2] / "runtime"


def test_version_is_that_of_the_installed_package() -> None:
    try:
        installed = metadata.version("anydoor-runtime")
    except metadata.PackageNotFoundError:
        pytest.skip("it is not installed here")
    assert version() == installed


def test_a_clone_that_is_not_installed_has_a_version(tmp_path: Path) -> None:
    """Without site packages, and where the package is nothing but a folder."""
    (tmp_path / "runtime").symlink_to(RUNTIME)
    code = "from runtime.version import version; print(version())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "0+unknown"

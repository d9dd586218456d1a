"""Large pages are asked for where they are to be had for the asking, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import huge_pages
from runtime.huge_pages import SETTING, VARIABLE, environment

glibc = pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")


@pytest.fixture
def offered(tmp_path: Path) -> Path:
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


@glibc
def test_they_are_asked_for_where_they_are_offered(offered: Path) -> None:
    assert environment({"HOME": "/"}, offered) == {"HOME": "/", VARIABLE: f"{SETTING}=1"}


@glibc
def test_other_settings_are_kept(offered: Path) -> None:
    found = environment({VARIABLE: "glibc.malloc.check=1"}, offered)
    assert found == {VARIABLE: f"glibc.malloc.check=1:{SETTING}=1"}


def test_what_the_user_has_chosen_stays(offered: Path) -> None:
    assert environment({VARIABLE: f"{SETTING}=0"}, offered) is None


@pytest.mark.parametrize("content", ["[always] madvise never", "always madvise [never]"])
def test_nothing_is_asked_where_the_system_has_decided(content: str, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text(content)
    assert environment({}, tmp_path / "enabled") is None


def test_other_systems_have_none(tmp_path: Path, offered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment({}, tmp_path / "not there") is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert environment({}, offered) is None


@glibc
@pytest.mark.parametrize("command", [["-m", "runtime"], ["-c", "from runtime.__main__ import main; main()"]])
def test_the_command_starts_again_once_and_keeps_its_arguments(command: list[str], tmp_path: Path) -> None:
    """Seen from outside: the number of times that Python starts in it, by a module that says so."""
    (tmp_path / "sitecustomize.py").write_text("import sys; print('started', file=sys.stderr)\n")
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    result = subprocess.run(
        [sys.executable, *command, "composite", "--help"],
        env={**variables, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    starts = 2 if environment(variables, huge_pages.OFFER) else 1
    assert result.stderr.count("started") == starts
    assert "usage: " in result.stdout
    assert "--reference" in result.stdout

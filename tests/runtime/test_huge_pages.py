"""Large pages are asked for where Linux gives them to programs that ask, and only there."""

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


def start(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs Python, which prints "started" every time that it starts."""
    (folder / "sitecustomize.py").write_text("import sys; print('started', file=sys.stderr)\n")
    paths = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return subprocess.run(
        [sys.executable, *command],
        env={**inherited, "PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        check=True,
    )


def starts() -> int:
    """How often a command starts on this machine."""
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    return 2 if environment(variables, huge_pages.OFFER) else 1


@glibc
@pytest.mark.parametrize("command", [["-m", "runtime"], ["-c", "from anydoor_command import main; main()"]])
def test_the_command_starts_again_once_and_keeps_its_arguments(command: list[str], tmp_path: Path) -> None:
    result = start(tmp_path, *command, "composite", "--help")
    assert result.stderr.count("started") == starts()
    assert "usage: " in result.stdout
    assert "--reference" in result.stdout


@glibc
@pytest.mark.parametrize("command", [["-v", "composite", "--help"], ["composite", "--help", "--verbose"]])
def test_it_says_that_it_starts_again_if_asked(command: list[str], tmp_path: Path) -> None:
    result = start(tmp_path, "-m", "runtime", *command)
    assert result.stderr.count("anydoor: starting again with GLIBC_TUNABLES=") == starts() - 1


@glibc
def test_a_flag_and_the_environment_turn_it_off(tmp_path: Path) -> None:
    command = ["-m", "runtime", "composite", "--help"]
    assert start(tmp_path, *command, "--no-huge-pages").stderr.count("started") == 1
    assert start(tmp_path, *command, **{VARIABLE: f"{SETTING}=0"}).stderr.count("started") == 1

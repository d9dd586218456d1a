"""The command `anydoor`: its subcommands, those of other distributions, and files that hide its packages."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.cli import BUILT_IN, GROUP, load_command, main, parser
from runtime.version import version

ROOT = Path(__file__).parents[3]
Capture = pytest.CaptureFixture[str]


def anydoor(*arguments: str, path: Path, module: str = "runtime") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a folder at the head of Python's path."""
    paths = os.pathsep.join([str(path), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_help_of_every_command_has_examples(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: anydoor {name}" in printed
    assert f"examples:\n  anydoor {name}" in printed


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_examples_of_the_help_are_accepted(name: str) -> None:
    commands = [load_command(each) for each in BUILT_IN]
    for line in load_command(name).EXAMPLES.replace("\\\n", " ").strip().splitlines():
        program, *arguments = shlex.split(line.split(" < ")[0])
        if program == "anydoor":
            assert parser(commands).parse_args(arguments), line


def test_help_lists_every_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr()
    assert all(f"\n    {name} " in printed.out for name in BUILT_IN)
    assert not printed.err


@pytest.mark.parametrize("arguments", [[], ["compose"], ["--bundle", "x"]])
def test_what_is_no_command(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("anydoor: ")
    assert sentence.endswith("(see: anydoor --help)")


def test_a_wrong_flag_is_refused_in_one_sentence(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["composite", "--scene", "desk.jpg", "--box", "80,60,300", "-o", "out.png"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "anydoor: argument --box: '80,60,300' is not a box: four whole numbers x0,y0,x1,y1 are "
        "expected, like 80,60,300,260 (see: anydoor composite --help)\n"
    )


def test_the_version_is_that_of_the_distribution(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert not exit_.value.code
    assert capsys.readouterr().out == f"anydoor-runtime {version()}\n"


def test_serve_takes_the_window_of_composite(tiny_bundle: Path, capfd: Capture) -> None:
    pytest.importorskip("grpc")
    assert main(["serve", "--bundle", str(tiny_bundle), "--control-window", "5"]) == 2
    assert "control_window must be from 1 to 4" in capfd.readouterr().err


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """A folder with a distribution of somebody else's, which adds a command and one that cannot be loaded."""
    (tmp_path / "somebodys.py").write_text(
        "from engines.errors import AnyDoorError\n"
        "NAME, HELP, EXAMPLES = 'count', 'Count to a number', 'anydoor count 3'\n"
        "def add_arguments(parser):\n"
        "    parser.add_argument('last', type=int)\n"
        "def run(options):\n"
        "    if options.last < 1:\n"
        "        raise AnyDoorError('that is no number to count to')\n"
        "    print(*range(1, options.last + 1))\n"
        "    return 3\n"
    )
    info = tmp_path / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\ncount = somebodys\nlost = nowhere_at_all\n")
    return tmp_path


def test_another_distribution_adds_a_command(distribution: Path) -> None:
    counted = anydoor("count", "3", path=distribution)
    assert counted.returncode == 3
    assert counted.stdout == "1 2 3\n"
    refused = anydoor("count", "0", path=distribution)
    assert refused.returncode == 2
    assert "anydoor: that is no number to count to\n" in refused.stderr
    listed = anydoor("--help", path=distribution)
    assert "count to a number" in listed.stdout
    assert "the command 'lost' cannot be loaded: No module named 'nowhere_at_all'" in listed.stderr


def test_commands_of_others_are_not_looked_for_where_ours_is_named(distribution: Path) -> None:
    listed = anydoor("composite", "--help", path=distribution)
    assert listed.returncode == 0
    assert "lost" not in listed.stderr


@pytest.mark.parametrize("package", ["runtime", "engines"])
@pytest.mark.parametrize("as_file", [True, False])
def test_what_hides_a_package_is_named(package: str, as_file: bool, tmp_path: Path) -> None:
    hiding = tmp_path / f"{package}.py" if as_file else tmp_path / package / "__init__.py"
    hiding.parent.mkdir(exist_ok=True)
    hiding.touch()
    result = anydoor("doctor", path=tmp_path, module="anydoor_command")
    assert result.returncode == 2
    assert result.stderr.startswith(f"anydoor: '{hiding}' hides the package '{package}' of anydoor-runtime: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_that_is_no_package_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "runtime").mkdir()
    assert anydoor("composite", "--help", path=tmp_path, module="anydoor_command").returncode == 0

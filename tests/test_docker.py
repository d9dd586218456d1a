"""What the images run, checked against the command line: no Docker is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from runtime.cli import BUILT_IN, load_command, parser

DOCKERFILES = sorted(Path(__file__).parents[1].glob("docker/*.Dockerfile"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_the_health_check_asks_where_the_server_answers(dockerfile: Path) -> None:
    text = dockerfile.read_text("utf-8")
    commands = parser([load_command(name) for name in BUILT_IN])
    served = json.loads(re.findall(r"^CMD (.*)$", text, re.MULTILINE)[-1])
    program, *checked = json.loads(re.findall(r"^HEALTHCHECK .*CMD (.*)$", text, re.MULTILINE)[-1])
    address = f"http://{commands.parse_args(served).metrics}"
    assert (program, commands.parse_args(checked).address) == ("anydoor", address)
    # the documented command line replaces it
    (flags,) = re.findall(r"^# +serve --listen(?:.*\\\n#)*.*$", text, re.MULTILINE)
    documented = flags.replace("\\\n#", "").lstrip("# ").split()
    assert f"http://{commands.parse_args(documented).metrics}" == address


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_the_user_is_not_root(dockerfile: Path) -> None:
    assert re.findall(r"^USER (.*)$", dockerfile.read_text("utf-8"), re.MULTILINE)[-1] == "1000"

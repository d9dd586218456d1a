"""`anydoor studio`: the server's process, and the page that it announces."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.diffusion.presets import QUALITIES
from runtime.server.settings import Settings
from tests.support.serving import PATIENCE, ServerThread

ROOT = Path(__file__).parents[3]


def test_an_address_that_is_none_is_refused_in_a_sentence(tiny_bundle: Path) -> None:
    flags = ["--bundle", str(tiny_bundle), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:x"]
    command = [sys.executable, "-m", "runtime", "studio", *flags]
    studio = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert studio.returncode == 2
    assert "http must be host:port, not '127.0.0.1:x'" in studio.stderr
    assert "Traceback" not in studio.stderr


@pytest.mark.parametrize("package", ["grpc", "starlette", "uvicorn", "python_multipart"])
def test_a_missing_package_is_told_before_anything_is_opened(package: str) -> None:
    code = (
        f"import sys; sys.modules['{package}'] = None;"
        "from runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "studio", "--bundle", "none"]
    studio = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert studio.returncode == 2
    assert studio.stderr == (
        f"anydoor: the package '{package}' is missing; install it with: pip install '.[http]'\n"
    )


def test_what_cannot_be_served_is_refused_in_a_sentence() -> None:
    command = [sys.executable, "-m", "runtime", "studio", "--bundle", "none"]
    studio = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert studio.returncode == 2
    assert studio.stderr == (
        "anydoor: there is no bundle at 'none': build one with 'anydoor build CHECKPOINT'\n"
    )


def test_the_page_is_announced_when_it_is_there(tiny_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = ["--bundle", str(tiny_bundle), "--listen", "127.0.0.1:0", "--http", f"127.0.0.1:{port}"]
    with subprocess.Popen(
        [sys.executable, "-m", "runtime", "studio", *flags, "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line == f"The studio is at http://127.0.0.1:{port}/studio/   (Ctrl-C ends it)\n"
        with urllib.request.urlopen(line.split()[4], timeout=PATIENCE) as page:
            assert b"AnyDoor Studio" in page.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_a_configuration_says_where_the_page_is(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address of the studio is a default: flags come before the file, and the file before that."""
    served: list[Settings] = []
    monkeypatch.setattr("runtime.server.process.serve", lambda settings, _: served.append(settings) or 0)
    monkeypatch.setattr("runtime.cli.studio._announce", lambda *_: None)
    config = tmp_path / "studio.toml"
    config.write_text('http = "127.0.0.1:9000"\nlog_level = "debug"\n')
    for flags in ([], ["--config", str(config)], ["--config", str(config), "--http", "127.0.0.1:9001"]):
        assert main(["studio", "--bundle", str(tiny_bundle), *flags]) == 0
    assert [(each.http, each.log_level, each.studio) for each in served] == [
        ("127.0.0.1:8000", "warning", True),
        ("127.0.0.1:9000", "debug", True),
        ("127.0.0.1:9001", "debug", True),
    ]
    # a server may run beside it at the usual address
    assert {each.listen for each in served} == {("127.0.0.1:0",)}


def test_the_page_knows_the_steps_of_the_qualities() -> None:
    """It asks for previews of its pictures by them."""
    page = (ROOT / "runtime/server/http/studio/request.js").read_text("utf-8")
    (stated,) = re.findall(r"^const STEPS = \{(.*)\};", page, re.MULTILINE)
    steps = {name: int(count) for name, count in re.findall(r"(\w+): (\d+)", stated)}
    assert steps == {name: values["steps"] for name, values in QUALITIES.items() if "steps" in values}


def test_an_address_where_a_server_is_already_is_refused(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ServerThread(tiny_bundle, http="127.0.0.1:0", studio=True) as server:
        address = str(server.server.http_address)
        assert main(["studio", "--bundle", str(tiny_bundle), "--http", address]) == 2
    assert f"there is a server at {address} already" in capsys.readouterr().err


def test_any_free_port_can_be_asked_for(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    announced: list[str] = []
    monkeypatch.setattr("runtime.server.process.serve", lambda settings, _: served.append(settings) or 0)
    monkeypatch.setattr("runtime.cli.studio._announce", lambda url, _: announced.append(url))
    assert main(["studio", "--bundle", str(tiny_bundle), "--http", "127.0.0.1:0"]) == 0
    assert announced == [f"http://{served[0].http}/studio/"]
    assert not served[0].http.endswith(":0")

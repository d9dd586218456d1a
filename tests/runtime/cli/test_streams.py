"""Standard streams and pipes: pictures that can be read once, and streams that are closed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from runtime.cli import main
from runtime.cli.output import write_output
from runtime.result import Composite
from tests.support.pictures import SCENE, cutout

PATIENCE = 60.0
"""Seconds after which a test that waits for something gives up."""

ROOT = Path(__file__).parents[3]


@pytest.fixture
def flags(tmp_path: Path, tiny_bundle: Path) -> list[str]:
    """A picture of one step, but for the scene."""
    reference = tmp_path / "object.png"
    Image.fromarray(cutout()).save(reference)
    flags = ["composite", "--bundle", str(tiny_bundle), "--reference", str(reference), "--box", "4,4,40,30"]
    return [*flags, "--steps", "1", "--quiet", "-o", str(tmp_path / "out.png")]


def test_a_scene_may_come_from_a_pipe(flags: list[str], tmp_path: Path) -> None:
    Image.fromarray(SCENE).save(tmp_path / "scene.png")
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=lambda: pipe.write_bytes((tmp_path / "scene.png").read_bytes()))
    writer.start()
    assert main([*flags, "--scene", str(pipe)]) == 0
    writer.join()
    assert Image.open(tmp_path / "out.png").size == (SCENE.shape[1], SCENE.shape[0])


@pytest.mark.parametrize(
    ("redirection", "arguments", "code", "says"),
    [
        ("2>&-", ["--scene", "scene.png"], 0, ""),
        ("<&-", ["--scene", "-"], 2, "standard input is closed"),
        (">&-", ["--scene", "scene.png", "-o", "-"], 2, "standard output is closed"),
    ],
)
def test_closed_streams_are_nobodys_fault_or_one_sentence(
    flags: list[str], tmp_path: Path, redirection: str, arguments: list[str], code: int, says: str
) -> None:
    Image.fromarray(SCENE).save(tmp_path / "scene.png")
    loud = [flag for flag in flags if flag != "--quiet"]
    command = [sys.executable, "-m", "runtime", *loud, *arguments]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out.png").is_file() == (code == 0)


def test_who_stops_while_pictures_are_written_knows_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.cli import output_place

    save = output_place.save_picture

    def interrupted(image: object, path: Path, *metadata: object) -> None:
        if path.stem == "out-2":
            raise KeyboardInterrupt
        save(image, path, *metadata)  # type: ignore[arg-type]

    monkeypatch.setattr(output_place, "save_picture", interrupted)
    results = [Composite(SCENE, seed, (), {}) for seed in (7, 8, 9)]
    with pytest.raises(KeyboardInterrupt):
        write_output(tmp_path / "out.png", results, grid=False)
    assert capsys.readouterr().out == f"{tmp_path / 'out-1.png'} (seed 7)\n"


def test_the_first_process_of_a_container_ends_when_it_is_told_to() -> None:
    """It gets no SIGTERM that it has no handler for."""
    namespace = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("there are no namespaces of processes here")
    command = [*namespace, sys.executable, "-m", "runtime", "segment", "-", "-o", "mask.png"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT) as process:
        for _ in range(int(PATIENCE / 0.1)):  # it may not have its handler yet
            for child in psutil.Process(process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    child.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
                break
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM

"""The counting of functions that a request passes: on a project made up for it, and on the real one."""

from __future__ import annotations

import importlib
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from benchmarks.support.call_trace import CallRecorder, Function, Project, Switch, files_of, profiling
from benchmarks.support.reference_walk import PictureMarks, ReferenceWalk
from benchmarks.walks import entry_point, main

Capture = pytest.CaptureFixture[str]

WALK = '''
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image


def decorated(function):
    return function


@dataclass
class Request:
    scene: Any
    reference: Any


@dataclass
class Order:
    """Holds the reference two objects deep."""

    requests: list

    def first(self):
        return self.requests[0]


def main(paths):
    settings({"steps": 2})
    order = Order([Request(*paths)])
    return encode(order)


def settings(options):
    return options


def encode(order):
    request = order.first()
    scene, reference = load(request.scene), load(request.reference)
    describe(scene)
    prepared = crop(reference)
    paste(scene, prepared)
    mixture = paste(scene, prepared)
    show(mixture)
    network_input = (prepared.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    partial(send, 1)({"reference": network_input})
    return after(request)


@decorated
def load(path):
    return np.asarray(Image.open(path))


def describe(scene):
    return scene.shape


def crop(reference):
    return reference[2:-3, 4:-5].copy()


def paste(scene, prepared):
    result = scene.copy()
    result[: prepared.shape[0], : prepared.shape[1]] = prepared
    return result


def show(mixture):
    return mixture.shape


def send(number, inputs):
    return run(inputs)


def run(inputs):
    return inputs


def after(request):
    return request
'''

CALLS = """
import threading

from made_up import stub_pb2


def at_import():
    return 1


VALUE = at_import()


class Server:
    size = at_import()

    def answer(self):
        doubled = [twice(value) for value in range(3)]
        return sorted(doubled, key=lambda value: -value)

    @property
    def name(self):
        def inner():
            return "server"

        return inner()


def twice(value):
    return 2 * value


def late():
    from made_up import imported

    return imported.VALUE


def request(server):
    thread = threading.Thread(target=server.answer)
    thread.start()
    thread.join()
    stub_pb2.generated()
    late()
    return server.name


def never():
    return 0
"""


@pytest.fixture
def made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ModuleType, ModuleType, Project]]:
    """Two modules of a package, and the project that they are in."""
    folder = tmp_path / "made_up"
    folder.mkdir()
    sources = {
        "__init__": "",
        "walk": WALK,
        "calls": CALLS,
        "stub_pb2": "def generated():\n    return 1\n",
        "imported": "def at_import():\n    return 1\n\n\nVALUE = at_import()\n",
    }
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = [importlib.import_module(f"made_up.{name}") for name in ("walk", "calls")]
    yield modules[0], modules[1], Project(tmp_path, ["made_up"])
    for name in ("made_up", *(f"made_up.{name}" for name in sources)):
        sys.modules.pop(name, None)


def picture(path: Path, seed: int) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    return path


def test_the_reference_is_followed_through_objects_and_conversions(
    made_up: tuple[ModuleType, ModuleType, Project], tmp_path: Path
) -> None:
    module, _, project = made_up
    scene, reference = picture(tmp_path / "scene.png", 1), picture(tmp_path / "reference.png", 2)

    def is_end(function: Function) -> bool:
        return function.name == "run"

    walk = ReferenceWalk(project, PictureMarks(reference), PictureMarks(scene), is_end)
    with profiling(walk, this_thread=True):
        module.main([str(scene), reference])
    assert walk.ended
    names = [function.name for function in walk.functions]
    assert names == ["main", "encode", "Order.first", "load", "crop", "paste", "send", "run"]
    assert {function.file for function in walk.functions} == {"made_up/walk.py"}


def test_a_walk_without_the_reference_does_not_end(
    made_up: tuple[ModuleType, ModuleType, Project], tmp_path: Path
) -> None:
    module, _, project = made_up
    pictures = [picture(tmp_path / f"{seed}.png", seed) for seed in range(4)]
    walk = ReferenceWalk(project, PictureMarks(pictures[0]), PictureMarks(pictures[1]), lambda _: True)
    with profiling(walk, this_thread=True):
        module.main(pictures[2:])
    assert not walk.ended
    assert not walk.functions


def test_functions_are_counted_once_in_all_threads(made_up: tuple[ModuleType, ModuleType, Project]) -> None:
    _, module, project = made_up
    recorder = CallRecorder(project)
    with profiling(recorder, this_thread=True):
        module.request(module.Server())
        module.request(module.Server())
    names = {function.name for function in recorder.functions}
    assert names == {"request", "Server.answer", "Server.name", "Server.name.inner", "twice", "late"}
    assert files_of(recorder.functions) == {"made_up/calls.py"}
    assert len(recorder.functions) == len(names)


def test_a_switch_that_is_off_counts_nothing(made_up: tuple[ModuleType, ModuleType, Project]) -> None:
    _, module, project = made_up
    recorder = CallRecorder(project)
    switch = Switch(recorder)
    go, counted = threading.Event(), threading.Event()

    def work() -> None:
        module.twice(1)
        counted.set()
        go.wait()
        module.late()

    with profiling(switch, this_thread=False):
        thread = threading.Thread(target=work)
        thread.start()
        counted.wait()
        switch.on = True
        module.never()  # this thread is not profiled
        go.set()
        thread.join()
    assert {function.name for function in recorder.functions} == {"late"}


def test_other_folders_do_not_count(made_up: tuple[ModuleType, ModuleType, Project], tmp_path: Path) -> None:
    module, _, _ = made_up
    assert Project(tmp_path, ["another"]).function_of(module.crop.__code__) is None
    assert Project(tmp_path / "made_up", ["another"]).function_of(module.crop.__code__) is not None


def test_the_entry_point_is_that_of_the_command() -> None:
    root = Path(__file__).parents[2]
    assert entry_point(root).__code__.co_filename.startswith(str(root))


def test_the_command_walks_through_the_real_project(tiny_bundle: Path, capsys: Capture) -> None:
    assert main(["--bundle", str(tiny_bundle), "--list"]) == 0
    printed = capsys.readouterr().out
    found = re.search(
        r"^walks: CLI to ID encoder (\d+) functions; gRPC request (\d+) functions in (\d+) files",
        printed,
        re.M,
    )
    assert found
    command, request, files = map(int, found.groups())
    walk, requests = printed.split("a gRPC request:\n")
    assert len(re.findall(r"^  [\w/]+\.py:\d+ ", walk, re.M)) == command
    assert "runtime/imaging/" not in walk
    assert re.search(r"^  engines/.*\brun$", walk, re.M)
    assert len(re.findall(r"^  [\w/]+\.py:\d+ ", requests, re.M)) == request
    assert len(set(re.findall(r"^  ([\w/]+\.py):", requests, re.M))) == files
    assert "runtime/server/" in requests
    assert "_pb2" not in requests


def test_no_bundle(capsys: Capture) -> None:
    assert main(["--bundle", "none"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("walks.py: ")

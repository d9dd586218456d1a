"""Backends are found by looking into engines/backends; another folder there is another backend."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from engines import backends as package
from engines.engine import load_backend
from engines.registry import backends

ROOT = Path(__file__).parents[2]

FOLDERS = sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def test_every_folder_declares_its_backends() -> None:
    declared = [
        backend for folder in FOLDERS for backend in import_module(f"{package.__name__}.{folder}").BACKENDS
    ]
    assert sorted(backend.name for backend in declared) == sorted(backends())
    assert {backend.module.split(".")[2] for backend in declared} == set(FOLDERS)
    assert backends().keys() == {"onnxruntime", "openvino", "tensorrt_rtx", "tensorrt"}


@pytest.mark.parametrize("name", backends())
def test_a_backend_says_what_it_is(name: str) -> None:
    backend = backends()[name]
    assert backend.name == name
    assert backend.title
    extras = re.findall(r"'\.\[(\w+)\]'", backend.install)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in extras:
        installed = project.split(f"\n{extra} = [")[1].split("]")[0]
        assert backend.package in [name.removesuffix("-gpu") for name in re.findall(r'"([\w-]+)', installed)]
    assert extras or f"pip install {backend.package}" in backend.install
    assert set(backend.devices) <= {"cpu", "cuda"}
    assert "fp32" in backend.precisions


@pytest.mark.parametrize("name", backends())
def test_a_backend_has_the_functions_of_one(name: str) -> None:
    module = load_backend(name)
    for function in ("open_engine", "fits", "needed_bytes", "usable_devices", "examine"):
        assert callable(getattr(module, function))


def test_the_fastest_on_a_cpu_comes_first() -> None:
    assert [backend.name for backend in backends().values() if backend.runs == "onnxruntime"] == [
        "openvino",
        "onnxruntime",
    ]


def test_looking_for_backends_imports_no_library() -> None:
    code = (
        "import sys; from engines.registry import backends; found = backends();"
        "[(backend.installed, backend.has_card_files) for backend in found.values()];"
        "libraries = 'onnxruntime', 'openvino', 'tensorrt_rtx', 'tensorrt', 'cuda', 'engines.engine';"
        "print([name for name in libraries if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


ABACUS = {
    "__init__.py": """
from engines.registry import Backend

BACKENDS = (
    Backend(
        name="abacus",
        title="Abacus",
        runs="onnxruntime",
        package="onnxruntime",
        install="pip install abacus",
        devices=("cpu",),
        rank=-1,
        module="engines.backends.abacus.engine",
    ),
)
""",
    "engine.py": """
from engines.backends.onnxruntime.engine import OnnxRuntimeEngine


class AbacusEngine(OnnxRuntimeEngine):
    backend = "abacus"


def usable_devices():
    return {"cpu": "beads of wood"}


def fits(bundle, options):
    return True


def examine(bundle, options):
    return "cpu", ""


def open_engine(bundle, options, most_cache=None):
    return AbacusEngine(bundle, options)
""",
}
"""A folder of engines/backends that runs ONNX graphs, and is the fastest."""


def test_a_folder_is_all_that_a_backend_needs(tmp_path: Path, tiny_bundle: Path) -> None:
    """It is found, can be chosen, is chosen by itself, and draws."""
    (tmp_path / "abacus").mkdir()
    for name, text in ABACUS.items():
        (tmp_path / "abacus" / name).write_text(text)
    code = f"""
import engines.backends
engines.backends.__path__.append({str(tmp_path)!r})

from engines.bundle import Bundle
from engines.engine import choose_backend, load_backend
from engines.options import BACKENDS, EngineOptions
from engines.registry import backends
from runtime import Compositor, Sampling
from tests.support.pictures import PLACEMENT, SCENE

assert list(backends()) == ["abacus", "openvino", "onnxruntime", "tensorrt_rtx", "tensorrt"]
assert BACKENDS[1] == "abacus"
assert load_backend("abacus").usable_devices() == {{"cpu": "beads of wood"}}
assert choose_backend(Bundle.open({str(tiny_bundle)!r})) == "abacus"
pictures = []
for options in (EngineOptions(), EngineOptions("abacus"), EngineOptions("onnxruntime", "cpu")):
    compositor = Compositor.load({str(tiny_bundle)!r}, options)
    pictures.append(compositor.composite(SCENE, PLACEMENT, seed=7, sampling=Sampling(steps=1)).tobytes())
    print(compositor.engine.backend)
assert len(set(pictures)) == 1
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["abacus", "abacus", "onnxruntime"]

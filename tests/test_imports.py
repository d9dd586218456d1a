"""Who may import whom: the contracts in pyproject.toml hold, and commands load no more than they use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from importlinter.api import read_configuration

ROOT = Path(__file__).parents[1]

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "cv2",
    "scipy",
    "safetensors",
    "onnxruntime",
    "grpc",
    "tqdm",
)

UNUSED_TO_COMPOSITE = (
    *("torch", "onnx", "cv2", "scipy", "grpc", "google.protobuf", "tensorrt", "cuda", "openvino"),
    *(
        "tqdm",
        "asyncio",
        "concurrent.futures",
        "multiprocessing",
        "http",
        "ssl",
        "email",
        "importlib.metadata",
    ),
    *(
        "engines.cuda",
        "engines.backends.tensorrt.engine",
        "engines.backends.openvino.engine",
        "export",
        "runtime.cli.serve",
        "runtime.client",
        "runtime.server",
    ),
)
"""What `anydoor composite --quiet` with ONNX Runtime has no use for."""

PACKAGES = ("engines", "runtime", "export", "training", "benchmarks")

FRONT_DOORS = {"engines", "runtime", "training", "runtime.__main__"}
"""Import nothing, or all there is."""


def modules() -> set[str]:
    paths = (path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}


def layers() -> set[str]:
    """Every module that the ladder names."""
    contracts = read_configuration(str(ROOT / "pyproject.toml"))["contracts_options"]
    (ladder,) = (contract for contract in contracts if contract["type"] == "layers")
    return {name.strip("() ") for layer in ladder["layers"] for name in re.split("[|:]", layer)}


def test_import_rules_are_kept() -> None:
    lint = "from importlinter.cli import lint_imports_command as lint; lint()"
    result = subprocess.run(
        [sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_every_module_has_its_place_on_the_ladder() -> None:
    ladder = layers()
    homeless = {
        module
        for module in modules() - FRONT_DOORS
        if not any(module == layer or module.startswith(f"{layer}.") for layer in ladder)
    }
    assert not homeless


def test_importing_the_runtime_imports_nothing_heavy() -> None:
    code = f"import sys, runtime; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_compositing_imports_nothing_that_it_does_not_use(tiny_bundle: Path, tmp_path: Path) -> None:
    arguments = ["--reference", "object.png", "--scene", "scene.png", "--box", "30,20,80,70", "--steps", "1"]
    command = ["composite", *arguments, "--output", str(tmp_path / "out.png"), "--quiet"]
    command += ["--bundle", str(tiny_bundle), "--backend", "onnxruntime"]
    code = (
        f"import sys; from runtime.cli import main; assert main({command}) == 0;"
        f"print([name for name in {UNUSED_TO_COMPOSITE} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "examples", capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"

"""Whether our code fits the TensorRT of JetPack 6 and the newest one: `python -m tests.bindings`.

Of each version the Python bindings are downloaded, without the libraries that they bind (1 MB). mypy's
stubgen reads the types of all classes from them, and with these mypy checks our code: that every class,
attribute and enumerator that it uses exists, and takes as many arguments as it gets. Types of arguments are
not checked, because the bindings turn tuples and buffers into their own.

Not checked: what only TensorRT for RTX has, which other tests really call, and whether anything works.
Needs a C compiler, a package index, and a Python that both versions have bindings for (3.10 to 3.12).
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

VERSIONS = {"10.3.0": "tensorrt-cu12-bindings", "11.4.0.106": "tensorrt-cu13-bindings"}
"""Of JetPack 6.1 and 6.2, and the newest; with the distribution that has them."""
USERS = ("engines.backends.tensorrt.library", "engines.backends.tensorrt.plans", "export.plans")
"""Modules that call TensorRT."""
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "bindings"

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""All that the bindings take from these libraries. Nothing calls them while the bindings are imported."""

MYPY = """
[mypy]
strict = true
disallow_subclassing_any = false
warn_unused_ignores = false
disable_error_code = arg-type, no-untyped-call, var-annotated
[mypy-onnxruntime.*,openvino.*,tensorrt_rtx.*,cuda.*]
ignore_missing_imports = true
follow_imports = skip
[mypy-tensorrt]
ignore_errors = true
"""


def main() -> int:
    """Checks all versions; returns the exit code."""
    return max(check(version) for version in VERSIONS)


def check(version: str) -> int:
    """Checks one version; returns mypy's exit code.

    Raises:
        subprocess.CalledProcessError: the bindings cannot be had or read.
    """
    folder = FOLDER / version
    packages, libraries, types = (folder / name for name in ("packages", "libraries", "types"))
    if not packages.exists():
        install = ("-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:")
        python(*install, f"--target={packages}", f"{VERSIONS[version]}=={version}")
    make_libraries(libraries, version.split(".", maxsplit=1)[0])
    found = {"PYTHONPATH": str(packages), "LD_LIBRARY_PATH": str(libraries)}
    stubgen = ("-c", "from mypy.stubgen import main; main()", "--inspect-mode", "--quiet")
    python(*stubgen, "--module=tensorrt_bindings.tensorrt", f"--output={folder}", **found)
    stub = types / "tensorrt" / "__init__.pyi"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text(readable((folder / "tensorrt_bindings" / "tensorrt.pyi").read_text()))
    settings = folder / "mypy.ini"
    settings.write_text(MYPY)
    print(f"TensorRT {version}: ", end="", flush=True)
    modules = [f"--module={module}" for module in USERS]
    mypy = ("-m", "mypy", f"--config-file={settings}", f"--cache-dir={folder / 'cache'}", *modules)
    return python(*mypy, required=False, MYPYPATH=str(types))


def make_libraries(folder: Path, major: str) -> None:
    """Writes libraries that the bindings can be linked to, and that do nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    source = "\n".join(f"void *{name}(void) {{ return 0; }}" for name in FUNCTIONS)
    for library in LIBRARIES:
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / f"lib{library}.so.{major}")]
        subprocess.run(command, input=source, text=True, check=True)


def readable(stub: str) -> str:
    """A stub without the few lines of the bindings that are no Python, and without their own `bool`."""
    return "\n".join(line for line in stub.splitlines() if not line.startswith("bool:") and is_python(line))


def is_python(line: str) -> bool:
    """Whether a line of a stub can be parsed; only those of functions are looked at."""
    try:
        ast.parse(line.strip() if line.strip().startswith("def ") else "")
    except SyntaxError:
        return False
    return True


def python(*arguments: str, required: bool = True, **environment: str) -> int:
    """Runs this Python in the repository; returns its exit code."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=required, cwd=ROOT, env={**os.environ, **environment}).returncode


if __name__ == "__main__":
    sys.exit(main())

"""What the images install: each package by its version and hash, at the versions that the tests ran with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

IMAGES = {"rtx": ("3.12", "tensorrt"), "jetpack6": ("3.10", "serve"), "jetpack7": ("3.12", "serve")}
"""Lock -> the Python of its image, and an extra that it installs; all of them serve."""


def locked(name: str) -> dict[str, str]:
    """Package -> version, of a lock; every one must have a hash."""
    lines = (ROOT / "docker" / f"{name}.lock").read_text().replace("\\\n", " ").splitlines()
    pins = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", pin) for pin in pins)
    return dict(pin.split()[0].split("==") for pin in pins)


def holds(requirement: Requirement, python: str, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate(
        {"python_version": python, "extra": extra}
    )


@pytest.mark.parametrize("image", IMAGES)
def test_versions_are_those_of_the_constraints(image: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = locked(image) | locked("build")
    for constraint in constraints:
        name = canonicalize_name(constraint.name)
        if name in found and holds(constraint, IMAGES[image][0]):
            assert constraint.specifier.contains(found[name]), f"{name}: run 'make lock'"


@pytest.mark.parametrize("image", IMAGES)
def test_every_requirement_is_locked(image: str) -> None:
    python, extra = IMAGES[image]
    text = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    extras = [re.search(rf"^{name} = \[(.*?)\]$", text, re.S | re.M) for name in ("client", "serve", extra)]
    found = locked(image)
    names = []
    for block in (required, *extras):
        assert block is not None
        for line in re.findall(r'"([^"]+)"', re.sub(r"\[client\]", "", block[1])):
            requirement = Requirement(line)
            if requirement.name != "anydoor-runtime" and holds(requirement, python):
                names.append(requirement.name)
                assert requirement.specifier.contains(found[canonicalize_name(requirement.name)])
    assert {"numpy", "pillow", "grpcio", "protobuf"} <= set(names)


def test_dockerfiles_install_nothing_else() -> None:
    for dockerfile in (ROOT / "docker").glob("*.Dockerfile"):
        installs = re.findall(r"pip install (.+?)(?= \\$| *$)", dockerfile.read_text(), re.M)
        assert len(installs) == 3
        assert all("--require-hashes" in line or "--no-deps" in line for line in installs)

"""Systems: the manifest names one, which must be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from engines.bundle import Bundle
from engines.engine import open_engine
from engines.errors import BundleError
from engines.options import EngineOptions
from runtime import Compositor, systems
from runtime.systems import open_system, register_system
from runtime.systems.anydoor import DEFAULTS, AnyDoor
from runtime.systems.system import Model
from tests.support.anydoor import CONTROL, GRAPHS, ID_ENCODER
from tests.support.simulated_engine import Simulation


def compositor(bundle: Path, **changes: Any) -> Compositor:
    """One whose bundle says something else of itself."""
    opened = Bundle.open(bundle)
    changed = Bundle(bundle, replace(opened.manifest, **changes))
    return Compositor(changed, open_engine(opened, EngineOptions(backend="onnxruntime", device="cpu")))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(systems, "_REGISTERED", {})


def test_the_system_of_the_bundle_is_opened(tiny_bundle: Path) -> None:
    assert isinstance(compositor(tiny_bundle).system, AnyDoor)


@pytest.mark.parametrize("name", ["imprint_9", "", "any-door", "../anydoor", "os.path"])
def test_a_system_that_this_version_does_not_have(tiny_bundle: Path, name: str) -> None:
    with pytest.raises(BundleError) as caught:
        compositor(tiny_bundle, system=name)
    assert str(caught.value) == (
        f"the bundle at '{tiny_bundle}' is for the system '{name}', which this version does not have: "
        "upgrade anydoor-runtime"
    )


def test_an_engine_whose_system_is_missing_leaves_nothing_on_the_card(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(Bundle.open(tiny_bundle))
    monkeypatch.setattr("runtime.compositor.open_engine", lambda *_: simulation.engine)
    monkeypatch.setattr("runtime.compositor.open_system", lambda name, model: open_system("imprint_9", model))
    with pytest.raises(BundleError, match="does not have"):
        Compositor.load(tiny_bundle)
    assert simulation.device.allocated == 0


def test_a_module_of_the_folder_that_is_no_system(tiny_bundle: Path) -> None:
    with pytest.raises(BundleError, match="is for the system 'system', which this version does not have"):
        compositor(tiny_bundle, system="system")


@pytest.mark.parametrize("graph", [ID_ENCODER, CONTROL])
def test_a_graph_that_the_system_needs_is_missing(tiny_bundle: Path, graph: str) -> None:
    graphs = {
        name: record for name, record in Bundle.open(tiny_bundle).manifest.graphs.items() if name != graph
    }
    assert len(graphs) == len(GRAPHS) - 1
    with pytest.raises(BundleError, match=f"has no graph '{graph}'"):
        compositor(tiny_bundle, graphs=graphs)


@pytest.mark.usefixtures("registered")
def test_a_system_that_lives_elsewhere_is_registered(tiny_bundle: Path) -> None:
    class Elsewhere(AnyDoor):
        defaults: Mapping[str, Any] = MappingProxyType({**DEFAULTS, "steps": 3})

    models: list[Model] = []

    def create(model: Model) -> Elsewhere:
        models.append(model)
        return Elsewhere(model)

    register_system("elsewhere", create)
    opened = compositor(tiny_bundle, system="elsewhere")
    assert isinstance(opened.system, Elsewhere)
    assert opened.model is models[0]
    assert opened.defaults["steps"] == 3
    assert isinstance(compositor(tiny_bundle).system, AnyDoor)


@pytest.mark.usefixtures("registered")
def test_a_registered_system_comes_before_one_of_the_folder(tiny_bundle: Path) -> None:
    class Other(AnyDoor):
        pass

    register_system("anydoor", Other)
    assert type(compositor(tiny_bundle).system) is Other

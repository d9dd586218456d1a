"""No two modules need each other, not even through others and not even for types alone."""

from __future__ import annotations

import sys
from pathlib import Path

import grimp
import pytest

PACKAGES = ("engines", "runtime", "export", "training", "benchmarks")


def circle(graph: grimp.ImportGraph) -> list[str]:
    """The shortest circle of imports: a module, what it imports, and so on back to it; empty if there is
    none."""
    found: list[list[str]] = []
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            chain = graph.find_shortest_chain(imported, importer)
            if chain:
                found.append([importer, *chain])
    return min(found, key=len, default=[])


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert graph.find_modules_directly_imported_by("runtime.compositor")
    assert not circle(graph)


@pytest.mark.parametrize("hidden", ["", "def later():\n    ", "if TYPE_CHECKING:\n    "])
def test_a_circle_is_found(hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three modules, one of which imports at its top, in a function, or for types."""
    package = tmp_path / "made_up"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("from made_up import b\n")
    (package / "b.py").write_text("from made_up.c import number\n")
    (package / "c.py").write_text(f"from typing import TYPE_CHECKING\n{hidden}import made_up.a\nnumber = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]
    found = circle(grimp.build_graph("made_up", cache_dir=None))
    assert set(found) == {"made_up.a", "made_up.b", "made_up.c"}
    assert found[0] == found[-1]
    assert len(found) == 4

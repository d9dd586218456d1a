"""The fingerprint changes with the code that it stands for, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.support.fingerprint import BUNDLE_SOURCES, CHECKPOINT_SOURCES, ROOT, fingerprint


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("engines/spec.py", "engines/backends/one/engine.py", "benchmarks/seeded.py", "docs/page.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    return tmp_path


def test_an_edited_renamed_added_or_removed_file_changes_it(repository: Path) -> None:
    found = [fingerprint(root=repository)]
    module = repository / "engines/backends/one/engine.py"
    module.write_text("edited\n")
    found.append(fingerprint(root=repository))
    module = module.rename(module.with_name("renamed.py"))
    found.append(fingerprint(root=repository))
    (repository / "engines/added.py").touch()
    found.append(fingerprint(root=repository))
    module.unlink()
    found.append(fingerprint(root=repository))
    assert len(set(found)) == len(found)


def test_other_files_do_not_change_it(repository: Path) -> None:
    before = fingerprint(root=repository)
    (repository / "docs/page.md").write_text("edited\n")
    (repository / "engines/notes.txt").write_text("added\n")
    assert fingerprint(root=repository) == before


def test_a_checkpoint_does_not_depend_on_the_exporter(repository: Path) -> None:
    before = fingerprint(CHECKPOINT_SOURCES, repository)
    (repository / "engines/spec.py").write_text("edited\n")
    assert fingerprint(CHECKPOINT_SOURCES, repository) == before
    (repository / "benchmarks/seeded.py").write_text("edited\n")
    assert fingerprint(CHECKPOINT_SOURCES, repository) != before


@pytest.mark.parametrize("pattern", BUNDLE_SOURCES)
def test_every_glob_finds_files_of_this_repository(pattern: str) -> None:
    assert list(ROOT.glob(pattern))

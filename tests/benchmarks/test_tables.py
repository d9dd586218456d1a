"""Tables of the documentation: they hold what the results files hold, and a stale page is noticed."""

from pathlib import Path

import pytest

from benchmarks import tables

PAGE = "before\n<!-- table: {name} -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README with a stale table, in a repository of its own."""
    path = tmp_path / "README.md"
    path.write_text(PAGE.format(name="load"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return path


def test_what_stands_between_the_markers_is_rewritten(page: Path) -> None:
    assert tables.main([]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table: load -->\n| arrivals/s | batching |")
    assert text.endswith(" |\n<!-- end -->\nafter\n")
    assert "old" not in text


def test_a_stale_page_is_reported_and_left_as_it_is(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = page.read_text()
    assert tables.main(["--check"]) == 1
    assert page.read_text() == before
    assert "README.md: stale" in capsys.readouterr().out
    tables.main([])
    assert tables.main(["--check"]) == 0


def test_an_unknown_table_is_refused(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text(PAGE.format(name="nothing"))
    with pytest.raises(SystemExit) as stop:
        tables.main([])
    assert stop.value.code == 2
    assert "there is no table 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_has_rows_of_one_width(name: str) -> None:
    lines = tables.TABLES[name]().splitlines()
    assert len(lines) >= 4  # header, rule and at least two rows
    assert len({line.count("|") for line in lines}) == 1


def test_figures_are_those_of_the_results() -> None:
    row = next(
        row for row in tables.read("latency-full-amx")["rows"] if row["contender"]["precision"] == "bf16"
    )
    summary = row["summary"]["50 steps"]
    cell = f"{summary['p50']:.0f} ({summary['times_pytorch']['picture']:.2f} x)"
    line = next(line for line in tables.latency("latency-full-amx").splitlines() if "BF16" in line)
    assert f"| {cell} |" in line


def test_earlier_words_of_results_are_todays_in_tables() -> None:
    assert "dpm_solver_2m" in tables.TABLES["samplers"]()
    assert "dpm2m" not in tables.TABLES["samplers"]() + tables.feature_reuse() + tables.presets()

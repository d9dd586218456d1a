"""Tables of the documentation: they hold what the results files hold, and a stale page is noticed."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.support.markdown import load_columns
from benchmarks.support.results import read_results

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
        row for row in read_results("latency-full-amx")["rows"] if row["contender"]["precision"] == "bf16"
    )
    summary = row["summary"]["50 steps"]
    cell = f"{summary['p50']:.0f} ({summary['times_pytorch']['picture']:.2f} x)"
    line = next(line for line in tables.latency("latency-full-amx").splitlines() if "BF16" in line)
    assert f"| {cell} |" in line


def test_earlier_words_of_results_are_todays_in_tables() -> None:
    assert "dpm_solver_2m" in tables.TABLES["samplers"]()
    assert "dpm2m" not in tables.TABLES["samplers"]() + tables.feature_reuse() + tables.presets()


def test_rates_are_found_by_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older files tell it in words; the order of the rates does not matter."""
    before = tables.limits()

    def as_written_today(name: str) -> dict[str, Any]:
        results = read_results(name)
        for peak in results["peaks"]:
            peak["precision"] = "bf16" if "bfloat16" in peak["source"] else "fp32"
            peak["source"] = "measured"
        results["peaks"].reverse()
        return results

    monkeypatch.setattr(tables, "read_results", as_written_today)
    assert tables.limits() == before


def test_failed_requests_have_a_column_where_they_were_counted() -> None:
    row = read_results("load-small-cpu")["rows"][0]
    assert "failed" not in load_columns([row])
    assert load_columns([row | {"failed": 3}])["failed"](row | {"failed": 3}) == "3"

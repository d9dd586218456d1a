"""The documentation: its links, paths and commands exist, its tables are up to date, its pages are short."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import tables
from runtime.cli import all_commands, parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page.relative_to(ROOT) for page in (*tables.pages(), *(ROOT / "benchmarks").glob("*.md"))]
FOLDERS = "runtime|proto|engines|export|training|benchmarks|examples|tests|docs|docker"

every_page = pytest.mark.parametrize("page", PAGES, ids=str)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text("utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@every_page
def test_paths_in_the_text_exist(page: Path) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", (ROOT / page).read_text("utf-8")):
        assert (ROOT / path).exists(), path


@every_page
def test_commands_exist(page: Path) -> None:
    text = (ROOT / page).read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for script in re.findall(r"\bpython3? ([\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"\bpython3? -m ([\w.]+)", text):
        assert module == "venv" or find_spec(module), module
    for target in re.findall(r"(?:^ {4}|`)make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_all_benchmarks_are_listed() -> None:
    folder = ROOT / "benchmarks"
    listed = re.findall(r"^\|.*?\| `([\w/]+\.py)", (folder / "README.md").read_text("utf-8"), re.MULTILINE)
    scripts = [*folder.glob("[a-z]*.py"), *(folder / "studies").glob("[a-z]*.py")]
    assert {*listed, "tables.py"} == {script.relative_to(folder).as_posix() for script in scripts}


@every_page
def test_command_lines_are_accepted(page: Path) -> None:
    """Each `anydoor` in a block of code, with its flags, up to a redirection or a comment."""
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    accepting = parser(all_commands())
    for line in re.findall(r"^ {4,}anydoor (.+)$", text, re.MULTILINE):
        assert accepting.parse_args(shlex.split(re.split(r" [|<>&#]", line)[0])), line


@every_page
def test_extras_exist(page: Path) -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for named in re.findall(r"'\.\[([\w,]+)\]'", (ROOT / page).read_text("utf-8")):
        for extra in named.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def test_tables_are_up_to_date() -> None:
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize(("page", "lines"), [("README.md", 95), ("docs/performance.md", 120)])
def test_pages_are_short(page: str, lines: int) -> None:
    assert len((ROOT / page).read_text("utf-8").splitlines()) <= lines

"""Examples in docstrings give what they say, links of the guide lead somewhere, and its Python code compiles."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from planner.cli.main import build_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples" / "guide").glob("*.md"))]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("graph_capture", "solvers", "planner")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_there_are_examples() -> None:
    assert len(MODULES) >= 5


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_code_compiles(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:planner|solvers|graph_capture|examples|tests)/[\w/.]*)`", page.read_text()):
        assert (ROOT / name).exists(), name


def test_commands_of_the_readme_parse() -> None:
    commands = re.findall(r"^checkpoint-planner (.*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    options = [build_parser().parse_args(shlex.split(command, comments=True)) for command in commands]
    verbs = {option.verb for option in options}
    for verb in ("plan", "show", "compare", "pareto", "check", "minimum-budget", "max-batch", "certify", "verify"):
        assert verb in verbs
    assert {option.target.partition(":")[0] for option in options if ".py:" in getattr(option, "target", "")} == {
        "examples/small_gpt.py"
    }

"""The version is in one place, and the changelog has an entry for it."""

from __future__ import annotations

import re
from pathlib import Path

import planner

ROOT = Path(__file__).parents[2]


def test_the_latest_entry_is_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    entries = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    assert entries, "the changelog has no released version"
    assert entries[0] == planner.__version__
    assert entries == sorted(entries, key=lambda v: tuple(map(int, v.split("."))), reverse=True)


def test_the_headings_are_keep_a_changelogs() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert text.startswith("# Changelog\n")
    assert "## [Unreleased]" in text
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_wheel_takes_its_version_from_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "planner._version.__version__" }' in text
    assert 'dynamic = ["version"]' in text

"""Compiled code is made once per machine, by a process of its own."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from solvers import compiled
from solvers.snapshot import SnapshotRefinement
from tests.solvers.random_graphs import training_chain

pytest.importorskip("numba")


def test_whoever_waits_finds_it_ready() -> None:
    assert compiled.ready(wait=True)
    assert compiled.ready()


def test_of_several_that_ask_at_once_one_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp, compilations = tmp_path / "cache" / "compiled-1", []

    def warm_up() -> None:
        compilations.append(stamp.exists())
        with stamp.with_suffix(".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(compiled, "_stamp", lambda: stamp)
    monkeypatch.setattr(compiled, "warm_up", warm_up)
    compiled.main()
    compiled.main()
    assert compilations == [False]
    with stamp.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_until_then_solvers_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "ready", lambda wait=False: False)
    solution = SnapshotRefinement(gap=0.01).solve(training_chain(10), 90)
    assert solution.schedule is not None
    assert not any("annealed" in line or "polished" in line for line in solution.trace)


def test_the_kernels_are_all_listed() -> None:
    """A kernel that is not would be compiled without the stamp knowing of it."""
    root = Path(compiled.__file__).parent
    found = {
        "solvers." + ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*.py")
        if "@njit" in path.read_text(encoding="utf-8")
    }
    assert found == set(compiled.KERNELS)


def test_asking_imports_nothing_heavy() -> None:
    code = "import sys, solvers.compiled; sys.exit(any(m in sys.modules for m in ('numba', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Compiled code without the wait: numba's first compilation, a minute of work, done by a process of its own.

numba keeps what it compiled on disk, so the wait is once per machine and version. Until then solvers do without
compiled code: a first plan comes as soon as any other, and annealing joins when it is ready. What must not depend on
the clock (a work limit) waits for it instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KERNELS = (
    "solvers.snapshot.kernel",
    "solvers.free_order.kernel",
    "solvers.free_order.moves",
    "solvers.free_order.beam",
)
"""Modules of compiled code; a change in one of them makes everything compile again."""


class _Compiler:
    """The one process that compiles, if there is one."""

    process: subprocess.Popen[bytes] | None = None


def ready(wait: bool = False) -> bool:
    """Whether compiled code can be used at once; the first question starts the compilation where it is needed.

    With `wait` the answer is `False` only where numba is not installed.
    """
    if find_spec("numba") is None:
        return False
    stamp = _stamp()
    if stamp is None:  # nothing can be kept on disk: every process compiles for itself
        return wait
    if stamp.exists():
        return True
    if _Compiler.process is None:
        _Compiler.process = subprocess.Popen(
            [sys.executable, "-m", "solvers.compiled"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )
    if wait:
        _Compiler.process.wait()
        return True  # were it to fail, this process compiles for itself
    return False


@functools.cache
def _stamp() -> Path | None:
    """The file that says that this version of the code is compiled for this machine; `None` if none can be kept."""
    import llvmlite.binding  # pyright: ignore[reportMissingTypeStubs]
    import numba

    digest = hashlib.sha256()
    digest.update(f"{sys.version} {numba.__version__} {llvmlite.binding.get_host_cpu_name()}".encode())
    for name in KERNELS:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        digest.update(spec.origin.encode() + Path(spec.origin).read_bytes())
        digest.update(str(Path(spec.origin).stat().st_mtime_ns).encode())
    kernel: Any = importlib.import_module(KERNELS[0])
    folder = kernel.price.stats.cache_path
    return Path(folder) / f"compiled-{digest.hexdigest()[:24]}" if folder else None


def warm_up() -> None:
    """Compile everything that a solver uses, or load what an earlier process compiled, in this process."""
    from graph_capture.graph import Graph, Operator, Value
    from solvers.free_order.annealer import warm_up as warm_up_free_order
    from solvers.snapshot.anneal import Annealer, Cooling

    operators = (Operator("a", "a", "forward", (), (0,), 1.0), Operator("b", "b", "forward", (0,), (1,), 1.0))
    annealer = Annealer(Graph(operators, (Value(1, 0), Value(1, 1))))
    annealer.evaluate([0, 1])
    annealer.polish([0, 1], 2)
    annealer.anneal([0, 1], 1, seed=0, cooling=Cooling(), seconds=1.0, moves=1)
    warm_up_free_order()


def main() -> None:
    """Compile, and say so on disk; where several processes ask at once, the first compiles and the others wait."""
    stamp = _stamp()
    with contextlib.ExitStack() as turn:
        if stamp is not None:
            with contextlib.suppress(OSError):  # a folder that became read-only, or that cannot lock: nobody waits
                stamp.parent.mkdir(parents=True, exist_ok=True)
                lock = turn.enter_context(stamp.with_suffix(".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            if stamp.exists():
                return
        warm_up()
        if stamp is not None:
            with contextlib.suppress(OSError):  # the next process asks again
                stamp.touch()


if __name__ == "__main__":
    main()

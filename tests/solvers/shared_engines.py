"""Engine processes that outlive one solve: starting one takes a second, solving a tiny program a hundredth of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from solvers.snapshot.engine import EnginePool, _Worker


@contextlib.contextmanager
def shared_engines() -> Iterator[None]:
    """Within it every pool takes processes that an earlier one has left idle; those still busy are killed as ever."""
    idle: dict[str, list[_Worker]] = {}

    def enter(pool: EnginePool) -> EnginePool:
        for engine in pool._workers:
            waiting = idle.get(engine)
            pool._workers[engine] = waiting.pop() if waiting else _Worker(engine)
        return pool

    def leave(pool: EnginePool, *_: object) -> None:
        for engine, worker in pool._workers.items():
            if worker is not None and worker.busy:
                worker.kill()
            elif worker is not None:
                idle.setdefault(engine, []).append(worker)

    with patch.object(EnginePool, "__enter__", enter), patch.object(EnginePool, "__exit__", leave):
        try:
            yield
        finally:
            for workers in idle.values():
                for worker in workers:
                    worker.kill()

"""MathOpt engines in processes of their own: started once per solve, raced if asked, and killed if they hang.

HiGHS has been seen to ignore its time limit. A request therefore has a deadline of its own, a little after the
engine's time limit, at which the process is killed; the next request starts another one.
"""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from solvers.backends import BackendError

GRACE_SECONDS = 2.0
"""How long an engine may overrun its time limit before it is killed."""


class EngineError(BackendError):
    """An engine could not be started or refused a model."""


class Outcome(enum.Enum):
    """How an engine ended."""

    OPTIMAL = "optimal within the gap asked for"
    INFEASIBLE = "proven infeasible"
    LIMIT = "stopped at a limit"


@dataclass(frozen=True)
class Answer:
    """Best of what the engines said: dual bound, objective and nonzero columns of the best point, if there is one."""

    outcome: Outcome
    dual_bound: float
    objective: float
    columns: dict[int, float]
    engine: str
    seconds: float

    @property
    def has_point(self) -> bool:
        """Whether an integer point was found."""
        return math.isfinite(self.objective)


@dataclass(frozen=True)
class Limits:
    """When an engine stops; gaps are in units of the objective (absolute) and as a fraction of it (relative).

    `target`: a point with this objective is good enough (HiGHS only).
    """

    time_limit_seconds: float
    relative_gap: float = 1e-2
    absolute_gap: float = 1e-6
    node_limit: int | None = None
    target: float | None = None
    seed: int = 0


class _Worker:
    """One process with one engine in it."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        script = Path(__file__).with_name("worker.py")
        # -P: the script's folder must not shadow the standard library; a session of its own: Ctrl-C is the parent's
        self.process = subprocess.Popen(
            [sys.executable, "-P", os.fspath(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.busy = False

    def send(self, header: dict[str, Any], model: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(header).encode() + b"\n" + model)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineError(f"the {self.engine} process ended (exit code {self.process.poll()})") from error
        self.busy = True

    def receive(self) -> tuple[dict[str, Any], bytes]:
        """Read one answer; blocks, but only for as long as it takes to write what has begun to arrive."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"the {self.engine} process ended (exit code {self.process.wait()})")
        header = json.loads(line)
        body = self.process.stdout.read(header["bytes"])
        self.busy = False
        if "error" in header:
            raise EngineError(f"{self.engine}: {header['error']}")
        return header, body

    def kill(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # unsent bytes of a request to a process that is gone
                    pipe.close()
        self.process.wait()


class EnginePool:
    """A context that owns the worker processes of one solve; :meth:`submit`, then :meth:`poll` until it answers."""

    def __init__(self, engines: Sequence[str] = ("HIGHS",)) -> None:
        self._workers: dict[str, _Worker | None] = dict.fromkeys(engines)
        self._ticket = 0
        self._answers: list[Answer] = []
        self._started = self._deadline = 0.0

    def __enter__(self) -> EnginePool:
        for engine in self._workers:
            self._workers[engine] = _Worker(engine)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            if worker is not None:
                worker.kill()

    def submit(self, model: bytes, limits: Limits, start: Mapping[int, float] | None = None) -> None:
        """Give a model, and a point (column -> value) to start from, to every engine.

        An engine still busy with the model before is replaced; one that cannot use the point ignores it.
        """
        self._ticket += 1
        self._answers = []
        self._started = time.monotonic()
        self._deadline = self._started + limits.time_limit_seconds + GRACE_SECONDS
        header = {
            "time_limit_seconds": limits.time_limit_seconds,
            "relative_gap": limits.relative_gap,
            "absolute_gap": limits.absolute_gap,
            "node_limit": limits.node_limit,
            "target": limits.target,
            "seed": limits.seed,
            "start": list(start.items()) if start else [],
            "bytes": len(model),
            "ticket": self._ticket,
        }
        for engine, worker in self._workers.items():
            if worker is None or worker.busy:
                worker = self._restart(engine)
            worker.send(header | {"engine": engine}, model)

    def poll(self, timeout_seconds: float) -> Answer | None:
        """The answer, or `None` if there is none after `timeout_seconds`.

        The first engine that proves optimality or infeasibility settles the race; at their limits the best bound and
        the best point count. An engine that is past its deadline is killed.
        """
        until = time.monotonic() + timeout_seconds
        while True:
            busy = [w for w in self._workers.values() if w is not None and w.busy]
            if not busy:
                return self._combined()
            now = time.monotonic()
            readable = _readable(busy, max(0.0, min(until, self._deadline) - now))
            if not readable and now > self._deadline:
                for worker in busy:
                    self._restart(worker.engine)
                return self._combined()
            for worker in readable:
                answer = self._parse(worker)
                self._answers.append(answer)
                if answer.outcome is not Outcome.LIMIT:
                    return self._settle()
            if time.monotonic() >= until and any(w is not None and w.busy for w in self._workers.values()):
                return None

    def answered(self) -> bool:
        """Whether :meth:`poll` would have something to read; never blocks."""
        busy = [w for w in self._workers.values() if w is not None and w.busy]
        return len(busy) < len(self._workers) or bool(_readable(busy, 0.0)) or time.monotonic() > self._deadline

    def solve(self, model: bytes, limits: Limits) -> Answer:
        """Submit and wait."""
        self.submit(model, limits)
        while (answer := self.poll(limits.time_limit_seconds + 2 * GRACE_SECONDS)) is None:
            pass
        return answer

    def _restart(self, engine: str) -> _Worker:
        worker = self._workers[engine]
        if worker is not None:
            worker.kill()
        fresh = self._workers[engine] = _Worker(engine)
        return fresh

    def _settle(self) -> Answer:
        for engine, worker in self._workers.items():
            if worker is not None and worker.busy:
                self._restart(engine)
        return self._combined()

    def _parse(self, worker: _Worker) -> Answer:
        import numpy

        header, body = worker.receive()
        columns = numpy.frombuffer(body, dtype=numpy.int64, count=header["columns"])
        values = numpy.frombuffer(body, dtype=numpy.float64, offset=columns.nbytes)
        return Answer(
            outcome=_outcome(header["reason"]),
            dual_bound=-math.inf if math.isnan(header["dual_bound"]) else header["dual_bound"],
            objective=math.inf if header["objective"] is None else header["objective"],
            columns=dict(zip(columns.tolist(), values.tolist(), strict=True)),
            engine=worker.engine,
            seconds=time.monotonic() - self._started,
        )

    def _combined(self) -> Answer:
        seconds = time.monotonic() - self._started
        if not self._answers:  # every engine was killed
            return Answer(Outcome.LIMIT, -math.inf, math.inf, {}, "", seconds)
        settled = [a for a in self._answers if a.outcome is not Outcome.LIMIT]
        best = settled[0] if settled else min(self._answers, key=lambda a: a.objective)
        bound = max(a.dual_bound for a in self._answers)
        return Answer(best.outcome, bound, best.objective, best.columns, best.engine, seconds)


def _outcome(reason: str) -> Outcome:
    if reason == "OPTIMAL":
        return Outcome.OPTIMAL
    # every column is bounded, so "infeasible or unbounded" is infeasible
    if reason in ("INFEASIBLE", "INFEASIBLE_OR_UNBOUNDED"):
        return Outcome.INFEASIBLE
    return Outcome.LIMIT


def _readable(workers: Sequence[_Worker], timeout_seconds: float) -> list[_Worker]:
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            assert worker.process.stdout is not None
            selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        return [key.data for key, _ in selector.select(timeout_seconds)]

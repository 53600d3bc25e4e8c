"""The process that runs MathOpt engines, so that one which ignores its time limit can be killed.

Run as a script by :mod:`solvers.snapshot.engine`; it imports nothing of this project. A request is one line of JSON
followed by a serialized ``ModelProto``; the answer is one line of JSON followed by the ids and the values of the
columns that are not zero. The process ends when its standard input closes, also in the middle of a solve: a parent
that dies leaves no orphan.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import queue
import sys
import threading
from typing import Any, BinaryIO, cast

# native code prints to file descriptor 1: answers go to a copy of it, everything else to standard error
_ANSWERS = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)


def _requests(stream: BinaryIO, pending: queue.Queue[tuple[dict[str, Any], bytes]]) -> None:
    while line := stream.readline():
        header = json.loads(line)
        pending.put((header, stream.read(header["bytes"])))
    os._exit(0)


def _solve(header: dict[str, Any], model: bytes) -> tuple[dict[str, Any], bytes]:
    from ortools.math_opt import model_pb2  # pyright: ignore[reportMissingTypeStubs]
    from ortools.math_opt.python import mathopt  # pyright: ignore[reportMissingTypeStubs]

    if header["engine"] not in mathopt.SolverType.__members__:
        raise ValueError(f"there is no engine {header['engine']!r} among {', '.join(mathopt.SolverType.__members__)}")
    parameters = mathopt.SolveParameters(
        time_limit=datetime.timedelta(seconds=header["time_limit_seconds"]),
        relative_gap_tolerance=header["relative_gap"],
        absolute_gap_tolerance=header["absolute_gap"],
        node_limit=header["node_limit"],
        random_seed=header["seed"],
    )
    if header["engine"] == "HIGHS":  # its thread count is global, and refused as a common parameter
        highs: Any = cast("Any", parameters.highs)  # its stub has the types of the maps wrong
        highs.int_options["threads"] = 1
        highs.bool_options["output_flag"] = False
        # A restart has been seen to lose the optimum: a program of 425 columns "optimal" at twice the true cost.
        highs.bool_options["mip_allow_restart"] = False
        if header["target"] is not None:
            highs.double_options["objective_target"] = header["target"]
    else:
        parameters.threads = 1
    problem = mathopt.Model.from_model_proto(model_pb2.ModelProto.FromString(model))
    hints = mathopt.ModelSolveParameters()
    if header["start"]:
        columns = {problem.get_variable(column): value for column, value in header["start"]}
        hints.solution_hints.append(mathopt.SolutionHint(variable_values=columns))
    result = mathopt.solve(problem, mathopt.SolverType[header["engine"]], params=parameters, model_params=hints)
    answer: dict[str, Any] = {
        "reason": result.termination.reason.name,
        "dual_bound": result.termination.objective_bounds.dual_bound,
        "objective": None,
        "columns": 0,
    }
    body = b""
    if result.solutions and result.solutions[0].primal_solution is not None:
        import numpy

        primal = result.solutions[0].primal_solution
        nonzero = [(variable.id, value) for variable, value in primal.variable_values.items() if value != 0.0]
        ids = numpy.array([column for column, _ in nonzero], dtype=numpy.int64)
        values = numpy.array([value for _, value in nonzero], dtype=numpy.float64)
        answer |= {"objective": primal.objective_value, "columns": len(nonzero)}
        body = ids.tobytes() + values.tobytes()
    return answer, body


def main() -> None:
    """Answer requests until standard input closes."""
    pending: queue.Queue[tuple[dict[str, Any], bytes]] = queue.Queue()
    threading.Thread(target=_requests, args=(sys.stdin.buffer, pending), daemon=True).start()
    importlib.import_module("ortools.math_opt.python.mathopt")  # while the parent builds the first model

    while True:
        header, model = pending.get()
        try:
            answer, body = _solve(header, model)
        except Exception as error:  # reported to the parent, which raises it there
            answer, body = {"error": f"{type(error).__name__}: {error}"}, b""
        answer = {**answer, "bytes": len(body), "ticket": header["ticket"]}
        _ANSWERS.write(json.dumps(answer).encode() + b"\n" + body)
        _ANSWERS.flush()


if __name__ == "__main__":
    main()

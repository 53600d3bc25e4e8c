"""The form of a certificate file, read without trust: whatever is not as it should be is one clear error.

One JSON object; integers are bytes, exact rationals are texts "numerator/denominator", multipliers are
[row, mantissa, exponent]. Row and column names are those of :mod:`planner.certificate.relaxation`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graph_capture.graph import Graph, GraphError
from planner.certificate.cuts import Cut
from planner.certificate.duality import Leaf, Multiplier
from planner.certificate.relaxation import Column, RowName
from planner.certificate.replay import ScheduleRow
from planner.errors import CertificateError

FORMAT = "checkpoint-planner certificate"
SCHEMA_VERSION = "1.0"
SCOPE = "every schedule that runs each operator first in captured order, and any operator again anywhere"
"""What every bound of a certificate speaks of."""

MAX_EXPONENT = 4096
FIELDS = (
    "format",
    "schema_version",
    "graph",
    "budget_bytes",
    "schedule",
    "claims",
    "instants",
    "smallest_modelled_bytes",
    "rows",
    "cuts",
    "linear",
    "tree",
    "checksum",
)
CLAIMS = (
    "scope",
    "step_seconds",
    "recomputed_seconds",
    "overhead",
    "peak_bytes",
    "first_peak_bytes",
    "later_peak_bytes",
    "linear_bound",
    "integer_bound",
    "leaves",
    "solver",
    "solver_scope",
    "solver_bound",
)


@dataclass(frozen=True)
class Split:
    """A node of the tree that is not a leaf: `column` is 0 in node `zero` and 1 in node `one`."""

    column: Column
    zero: int
    one: int


@dataclass(frozen=True)
class Statement:
    """A certificate as data; nothing in it is checked but its form.

    **Fields:**

    - `schedule`: `None` if the certificate only says that nothing fits.
    - `rows`, `cuts`: multipliers refer to both, the cuts numbered after the rows.
    - `linear`: of the rows alone. `tree`: node 0 is the root, which may be the only leaf; may be empty.
    """

    graph: Graph
    budget_bytes: int
    schedule: tuple[ScheduleRow, ...] | None
    claims: Mapping[str, Any]
    instants: tuple[int, ...]
    smallest_modelled_bytes: int
    rows: tuple[RowName, ...]
    cuts: tuple[Cut, ...]
    linear: Leaf
    tree: tuple[Leaf | Split, ...]


def read_certificate(source: str | os.PathLike[str] | Mapping[str, Any]) -> Statement:
    """The certificate at a path, or in data that was parsed already; raises :class:`CertificateError`."""
    if isinstance(source, Mapping):
        data = dict(source)
    else:
        try:
            data = json.loads(Path(source).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CertificateError(f"{os.fspath(source)} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CertificateError("a certificate is a JSON object, this is none")
    return _statement(cast("dict[str, Any]", data))


def checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 over all fields but `checksum` itself."""
    rest = {key: data[key] for key in sorted(data) if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _statement(data: dict[str, Any]) -> Statement:
    if data.get("format") != FORMAT:
        raise CertificateError(f"this is no certificate: its format is {data.get('format')!r}, not {FORMAT!r}")
    version = data.get("schema_version")
    if not isinstance(version, str) or version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise CertificateError(f"schema version {version!r} cannot be read by this version ({SCHEMA_VERSION})")
    _same_fields("the certificate", data, FIELDS)
    _same_fields("its claims", _mapping("claims", data["claims"]), CLAIMS)
    if data["checksum"] != checksum(data):
        raise CertificateError("the checksum does not match: the certificate was changed after it was made")
    rows = tuple(_row_name(row) for row in _sequence("rows", data["rows"]))
    cuts = tuple(_cut(len(rows) + i, cut) for i, cut in enumerate(_sequence("cuts", data["cuts"])))
    nodes = _sequence("tree", data["tree"])
    return Statement(
        graph=_graph(data["graph"]),
        budget_bytes=_integer("budget_bytes", data["budget_bytes"]),
        schedule=None if data["schedule"] is None else _schedule(data["schedule"]),
        claims=data["claims"],
        instants=tuple(_integer("instants", t) for t in _sequence("instants", data["instants"])),
        smallest_modelled_bytes=_integer("smallest_modelled_bytes", data["smallest_modelled_bytes"]),
        rows=rows,
        cuts=cuts,
        linear=_leaf("linear", data["linear"], len(rows)),
        tree=tuple(_node(index, node, len(rows) + len(cuts)) for index, node in enumerate(nodes)),
    )


def _same_fields(what: str, data: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in data:
            raise CertificateError(f"the field {name!r} of {what} is missing")
    for name in data:
        if name not in names:
            raise CertificateError(f"{what} has the unknown field {name!r}")


def _mapping(what: str, item: Any) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise CertificateError(f"{what} is {_short(item)}, not an object")
    return cast("Mapping[str, Any]", item)


def _sequence(what: str, item: Any) -> Sequence[Any]:
    if not isinstance(item, (list, tuple)):
        raise CertificateError(f"{what} is {_short(item)}, not a list")
    return cast("Sequence[Any]", item)


def _integer(what: str, item: Any) -> int:
    if not isinstance(item, int) or isinstance(item, bool):
        raise CertificateError(f"{what} has {_short(item)} where an integer belongs")
    return item


def _short(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _graph(data: Any) -> Graph:
    try:
        graph = Graph.from_dict(_mapping("graph", data))
        for operator in graph.operators:
            if not isinstance(operator.seconds, float):
                raise TypeError(f"operator {operator.name}: seconds are {operator.seconds!r}, no floating-point number")
        _ = graph.fingerprint, graph.uses
        return graph
    except (GraphError, TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
        if isinstance(error, CertificateError):
            raise
        raise CertificateError(f"the graph cannot be rebuilt: {error}") from error


def _schedule(data: Any) -> tuple[ScheduleRow, ...]:
    rows: list[ScheduleRow] = []
    for item in _sequence("schedule", data):
        if isinstance(item, (list, tuple)):
            pair = [_integer("schedule", x) for x in cast("Sequence[Any]", item)]
            if len(pair) != 2 or min(pair) < 0:
                raise CertificateError(f"the schedule has {_short(pair)} where [operator, value] belongs")
            rows.append((pair[0], pair[1]))
        else:
            rows.append(_integer("schedule", item))
    return tuple(rows)


def _row_name(data: Any) -> RowName:
    kind, *indices = _sequence("rows", data) or [None]
    if not isinstance(kind, str):
        raise CertificateError(f"rows has {_short(data)} where the name of a row belongs")
    return (kind, *(_integer("rows", index) for index in indices))


def _leaf(what: str, data: Any, n_rows: int) -> Leaf:
    leaf = _mapping(what, data)
    _same_fields(what, leaf, ("multipliers", "infeasible"))
    multipliers: list[Multiplier] = []
    for item in _sequence(what, leaf["multipliers"]):
        numbers = [_integer(what, x) for x in _sequence(what, item)]
        if len(numbers) != 3:
            raise CertificateError(f"{what} has {_short(item)} where [row, mantissa, exponent] belongs")
        row, mantissa, exponent = numbers
        if not 0 <= row < n_rows:
            raise CertificateError(f"{what} has a multiplier for row {row} of {n_rows}")
        if mantissa < 0:
            raise CertificateError(f"{what} has a negative multiplier for row {row}, which proves nothing")
        if abs(exponent) > MAX_EXPONENT:
            raise CertificateError(f"{what} has a multiplier with exponent {exponent}, beyond {MAX_EXPONENT}")
        multipliers.append((row, mantissa, exponent))
    if not isinstance(leaf["infeasible"], bool):
        raise CertificateError(f"{what} has {_short(leaf['infeasible'])} where true or false belongs")
    return Leaf(tuple(multipliers), leaf["infeasible"])


def _node(index: int, data: Any, n_rows: int) -> Leaf | Split:
    what = f"node {index} of the tree"
    node = _mapping(what, data)
    if "column" not in node:
        return _leaf(what, node, n_rows)
    _same_fields(what, node, ("column", "zero", "one"))
    return Split(_column(what, node["column"]), _integer(what, node["zero"]), _integer(what, node["one"]))


def _column(what: str, data: Any) -> Column:
    column = _sequence(what, data)
    if len(column) != 3 or column[0] not in ("k", "r", "h"):
        raise CertificateError(f"{what} has {_short(column)} where a column belongs")
    return str(column[0]), _integer(what, column[1]), _integer(what, column[2])


def _cut(index: int, data: Any) -> Cut:
    what = f"cut {index}"
    cut = _mapping(what, data)
    _same_fields(what, cut, ("combine", "complement", "divisor"))
    combine: list[tuple[int, int]] = []
    for item in _sequence(what, cut["combine"]):
        pair = [_integer(what, x) for x in _sequence(what, item)]
        if len(pair) != 2:
            raise CertificateError(f"{what} has {_short(item)} where [row, weight] belongs")
        combine.append((pair[0], pair[1]))
    columns = tuple(_column(what, column) for column in _sequence(what, cut["complement"]))
    return Cut(tuple(combine), columns, _integer(what, cut["divisor"]))

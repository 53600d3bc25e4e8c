"""The graph that every solver works on: operators with their price, and the values that they make.

A *value* is one storage (an allocation), not one tensor: views share a value and cost nothing. An *operator* is one
ATen call of the joint forward-backward graph. The operators stand in captured order, which is the order in which
PyTorch would run them; ``Graph`` carries no torch object, so that a solver can be run and tested without torch.

Memory that no schedule can change (parameters, buffers, inputs) is *resident* and is no value. The gradients of the
parameters are values that are *delivered*: they stay in memory (first micro-batch) or are added to a resident
``.grad`` and released (later micro-batch) once operator ``delivered_after`` has run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import networkx

Phase = Literal["forward", "loss", "backward"]
ValueKind = Literal["activation", "output", "gradient"]
PHASES: tuple[Phase, ...] = ("forward", "loss", "backward")
Compiler = Literal["eager", "inductor"]
"""Whose kernels run a step: PyTorch's own one by one, or those that Inductor generates."""
VALUE_KINDS: tuple[ValueKind, ...] = ("activation", "output", "gradient")


class GraphError(ValueError):
    """A graph breaks one of the rules of :class:`Graph`; the message names the operator or value at fault."""


@dataclass(frozen=True, slots=True)
class Value:
    """One storage made by an operator.

    **Fields:**

    - `size_bytes`: bytes that the allocator hands out for it; 0 is allowed (an empty tensor).
    - `producer`: index of the operator that makes it.
    - `kind`: `"activation"` may be freed and made again; `"output"` is handed to the caller and stays until the end of
      the step; `"gradient"` is a parameter's or input's gradient, delivered after `delivered_after`.
    - `delivered_after`: index of the operator after which a gradient is handed over; `None` for other kinds.
    - `delivery_copy_bytes`: bytes that autograd allocates when it cannot take the gradient over as it is.
    - `shape`, `dtype`: of the largest tensor in the storage; for reports only.
    """

    size_bytes: int
    producer: int
    kind: ValueKind = "activation"
    delivered_after: int | None = None
    delivery_copy_bytes: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Operator:
    """One ATen call of the joint graph.

    **Fields:**

    - `name`: unique in the graph and stable across processes.
    - `inputs`, `outputs`: indices of values, each without repetition. Resident memory is not listed.
    - `seconds`, `flops`: price of one execution. `priced_by` is `"flops"` when a FLOP formula exists and `"bytes"`
      when the operator is priced by the bytes that it moves.
    - `workspace_bytes`: scratch memory that exists only while the operator runs.
    - `recomputable`: whether it may run a second time; where not, `keep_reason` says why.
    - `random_state_bytes`: size of the generator state that must be saved if the operator is recomputed; 0 if it
      draws no random numbers.
    - `in_place`: pairs (input, output): the output may take over the allocation of the input if the input is not
      needed any more. Both have the same size.
    - `module`, `source`: where it comes from, for reports.
    """

    name: str
    target: str
    phase: Phase
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: float
    flops: int = 0
    workspace_bytes: int = 0
    recomputable: bool = True
    keep_reason: str = ""
    random_state_bytes: int = 0
    in_place: tuple[tuple[int, int], ...] = ()
    priced_by: Literal["flops", "bytes"] = "bytes"
    module: str = ""
    source: str = ""


@dataclass(frozen=True)
class Graph:
    """Operators in captured order and the values that they make; validated on construction.

    **Fields:**

    - `resident_bytes`: memory that is there whatever the schedule, by label (parameters, buffers, inputs, ...).
    - `accumulated_gradient_bytes`: size of the `.grad` tensors that a *later micro-batch* finds already there.
    - `gradient_accumulation`: whether a schedule must also fit in a later micro-batch (see :mod:`solvers.simulator`).
    - `released`: values of the forward phase that no schedule may hold across the *turn*, the instant after the last
      forward operator has first run: where the backward phase reads them, they are recomputed. Ascending.

    Raises :class:`GraphError` when an input has no producer before it, a price is negative or not finite, two values
    or operators disagree about who makes what, or the phases are out of order.
    """

    operators: tuple[Operator, ...]
    values: tuple[Value, ...]
    resident_bytes: Mapping[str, int] = field(default_factory=dict)
    accumulated_gradient_bytes: int = 0
    gradient_accumulation: bool = False
    name: str = ""
    released: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "resident_bytes", dict(self.resident_bytes))
        object.__setattr__(self, "released", tuple(self.released))
        _validate(self)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __len__(self) -> int:
        return len(self.operators)

    @cached_property
    def resident_total_bytes(self) -> int:
        """Bytes that are in memory at every instant of a first micro-batch."""
        return sum(self.resident_bytes.values())

    @cached_property
    def step_seconds(self) -> float:
        """Seconds of the store-all step: every operator once."""
        return math.fsum(operator.seconds for operator in self.operators)

    @cached_property
    def step_flops(self) -> int:
        """FLOPs of the store-all step."""
        return sum(operator.flops for operator in self.operators)

    @cached_property
    def uses(self) -> tuple[tuple[int, ...], ...]:
        """For each value the operators that read it, in captured order."""
        readers: list[list[int]] = [[] for _ in self.values]
        for index, operator in enumerate(self.operators):
            for value in operator.inputs:
                readers[value].append(index)
        return tuple(tuple(r) for r in readers)

    @cached_property
    def last_forward(self) -> int:
        """Index of the last operator of the forward phase; -1 if there is none."""
        return max((i for i, o in enumerate(self.operators) if o.phase == "forward"), default=-1)

    @cached_property
    def without_released(self) -> Graph:
        """The same graph with every value free to be held across the turn."""
        return dataclasses.replace(self, released=()) if self.released else self

    @cached_property
    def structure_fingerprint(self) -> str:
        """Hash of targets and edges alone: equal for the same model at another batch size."""
        return _digest([(o.target, o.phase, o.inputs, o.outputs, bool(o.random_state_bytes)) for o in self.operators])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that a schedule's legality and memory depend on; prices and names are left out."""
        rows = [
            (
                o.target,
                o.phase,
                o.inputs,
                o.outputs,
                o.workspace_bytes,
                o.recomputable,
                o.random_state_bytes,
                o.in_place,
            )
            for o in self.operators
        ]
        values = [(v.size_bytes, v.kind, v.delivered_after, v.delivery_copy_bytes) for v in self.values]
        resident = sorted(self.resident_bytes.items())
        parts = [rows, values, resident, self.accumulated_gradient_bytes, self.gradient_accumulation]
        # Left out where there is none, so that graphs without pins have the fingerprints that they always had.
        return _digest([*parts, self.released] if self.released else parts)

    def producers(self, operator: int) -> Iterator[int]:
        """The operators that make the inputs of `operator`, without repetition."""
        return iter(dict.fromkeys(self.values[v].producer for v in self.operators[operator].inputs))

    def to_networkx(self) -> networkx.DiGraph:
        """A directed graph over operator indices; an edge carries the `values` that pass along it."""
        import networkx

        graph: networkx.DiGraph = networkx.DiGraph()
        graph.add_nodes_from(range(len(self.operators)))
        for index, operator in enumerate(self.operators):
            for value in operator.inputs:
                producer = self.values[value].producer
                if graph.has_edge(producer, index):
                    graph.edges[producer, index]["values"].append(value)
                else:
                    graph.add_edge(producer, index, values=[value])
        return graph

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; :meth:`from_dict` is its inverse."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["operators"] = [_without_defaults(operator) for operator in self.operators]
        data["values"] = [_without_defaults(value) for value in self.values]
        if not self.released:  # programs that know no pins read everything else
            del data["released"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Graph:
        """Rebuild a graph from :meth:`to_dict`; raises :class:`GraphError` for unknown or missing fields."""
        try:
            fields = dict(data)
            fields["operators"] = tuple(Operator(**_tuples(row)) for row in data["operators"])
            fields["values"] = tuple(Value(**_tuples(row)) for row in data["values"])
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise GraphError(f"this is not a graph that this version can read: {error}") from error


def _without_defaults(item: Operator | Value) -> dict[str, Any]:
    """The fields that differ from their defaults: a plan of thousands of operators stays small."""
    return {f.name: v for f in dataclasses.fields(item) if (v := getattr(item, f.name)) != f.default}


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""

    def freeze(item: Any) -> Any:
        return tuple(freeze(x) for x in item) if isinstance(item, (list, tuple)) else item

    return {key: freeze(item) for key, item in row.items()}


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, separators=(",", ":")).encode()).hexdigest()[:32]


def _validate(graph: Graph) -> None:
    made: dict[int, int] = {}
    names: set[str] = set()
    phase = 0
    n_values = len(graph.values)
    for index, operator in enumerate(graph.operators):
        where = f"operator {index} ({operator.name or operator.target})"
        if operator.name in names:
            raise GraphError(f"{where}: its name occurs twice; names must be unique")
        names.add(operator.name)
        if operator.phase not in PHASES:
            raise GraphError(f"{where}: phase {operator.phase!r} is not one of {', '.join(PHASES)}")
        if PHASES.index(operator.phase) < phase:
            raise GraphError(f"{where}: a {operator.phase} operator stands after a later phase")
        phase = PHASES.index(operator.phase)
        _check_numbers(where, operator)
        _check_indices(where, operator, n_values)
        for value in operator.inputs:
            if value not in made:
                raise GraphError(f"{where}: input {value} is made by no operator before it (missing producer or cycle)")
        _check_in_place(where, operator, graph.values)
        for value in operator.outputs:
            if value in made or graph.values[value].producer != index:
                raise GraphError(
                    f"{where}: value {value} names operator {graph.values[value].producer} as its producer"
                )
            made[value] = index
    for index, value in enumerate(graph.values):
        _check_value(index, value, made, len(graph.operators))
    _check_resident(graph)
    _check_released(graph)


def _check_numbers(where: str, operator: Operator) -> None:
    if not (math.isfinite(operator.seconds) and operator.seconds >= 0):
        raise GraphError(f"{where}: seconds are {operator.seconds}; they must be finite and not negative")
    for label in ("flops", "workspace_bytes", "random_state_bytes"):
        number = getattr(operator, label)
        if not isinstance(number, int) or number < 0:
            raise GraphError(f"{where}: {label} is {number!r}; it must be an integer that is not negative")


def _check_indices(where: str, operator: Operator, n_values: int) -> None:
    for label, indices in (("inputs", operator.inputs), ("outputs", operator.outputs)):
        if len(set(indices)) != len(indices):
            raise GraphError(f"{where}: {label} {indices} name a value twice")
        if any(not 0 <= v < n_values for v in indices):
            raise GraphError(f"{where}: {label} {indices} name a value outside of 0..{n_values - 1}")


def _check_in_place(where: str, operator: Operator, values: Sequence[Value]) -> None:
    for source, target in operator.in_place:
        if source not in operator.inputs or target not in operator.outputs:
            raise GraphError(f"{where}: in_place pair {(source, target)} is not an (input, output) of it")
        if values[source].size_bytes != values[target].size_bytes:
            raise GraphError(f"{where}: the values of in_place pair {(source, target)} differ in size")


def _check_value(index: int, value: Value, made: Mapping[int, int], n_operators: int) -> None:
    where = f"value {index}"
    if not isinstance(value.size_bytes, int) or value.size_bytes < 0:
        raise GraphError(f"{where}: size_bytes is {value.size_bytes!r}; it must be an integer that is not negative")
    if made.get(index) != value.producer:
        raise GraphError(f"{where}: operator {value.producer} does not list it among its outputs")
    if value.kind not in VALUE_KINDS:
        raise GraphError(f"{where}: kind {value.kind!r} is not one of {', '.join(VALUE_KINDS)}")
    if (value.kind == "gradient") != (value.delivered_after is not None):
        raise GraphError(f"{where}: exactly the gradients name the operator that they are delivered after")
    if value.delivered_after is not None and not value.producer <= value.delivered_after < n_operators:
        raise GraphError(f"{where}: it is delivered after operator {value.delivered_after}, before it is made")


def _check_resident(graph: Graph) -> None:
    lines: Sequence[tuple[str, int]] = [
        *graph.resident_bytes.items(),
        ("accumulated_gradient_bytes", graph.accumulated_gradient_bytes),
    ]
    for label, size in lines:
        if not isinstance(size, int) or size < 0:
            raise GraphError(f"resident memory {label!r} is {size!r}; it must be an integer that is not negative")


def _check_released(graph: Graph) -> None:
    if not all(type(v) is int and 0 <= v < len(graph.values) for v in graph.released):
        raise GraphError(f"released names a value outside of 0..{len(graph.values) - 1}: {graph.released}")
    if list(graph.released) != sorted(set(graph.released)):
        raise GraphError("released must name each value once, in ascending order")
    for index in graph.released:
        value = graph.values[index]
        maker = graph.operators[value.producer]
        if maker.phase != "forward" or not maker.recomputable:
            raise GraphError(
                f"value {index} cannot be released: {maker.name} is no forward operator that may run twice"
            )
        if any(graph.values[v].kind != "activation" for v in maker.outputs):
            raise GraphError(f"value {index} cannot be released: a result of {maker.name} is handed to the caller")
        if any(graph.operators[reader].phase == "loss" for reader in graph.uses[index]):
            raise GraphError(f"value {index} cannot be released: the loss reads it right after the turn")

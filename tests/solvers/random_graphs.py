"""Random graphs for the tests of the solvers: families of shapes, and everything that an operator can have.

A *shape* is a list that gives for each operator the operators that it depends on. :func:`forward_graph` makes a graph
of one phase of it, :func:`joint_graph` a training step with a backward phase. :class:`Features` says how often the
special cases occur. All prices are small integers, so that sums are exact.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graph_capture.graph import Graph, Operator, Phase, Value, ValueKind

Shape = list[tuple[int, ...]]


@dataclass(frozen=True)
class Features:
    """Probabilities of the special cases, each per operator; booleans are per graph."""

    several_outputs: float = 0.0
    in_place: float = 0.0
    workspace: float = 0.0
    not_recomputable: float = 0.0
    random_state: float = 0.0
    zero_bytes: float = 0.0
    gradients: float = 0.0
    late_delivery: float = 0.0
    delivery_copy: float = 0.0
    gradient_reads: float = 0.0
    outputs: float = 0.0
    loss: bool = False
    gradient_accumulation: bool = False
    resident_bytes: int = 0


PLAIN = Features()
EVERYTHING = Features(
    several_outputs=0.3,
    in_place=0.4,
    workspace=0.3,
    not_recomputable=0.1,
    random_state=0.25,
    zero_bytes=0.1,
    gradients=0.5,
    late_delivery=0.3,
    delivery_copy=0.3,
    gradient_reads=0.2,
    outputs=0.1,
    loss=True,
    gradient_accumulation=True,
    resident_bytes=7,
)


@dataclass
class Builder:
    """Adds operators one by one; keeps the book of values."""

    operators: list[Operator] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def add(
        self, phase: Phase, inputs: Sequence[int], sizes: Sequence[int], seconds: float, **fields: Any
    ) -> list[int]:
        """Append an operator with one activation for each of `sizes`; returns the new values."""
        index = len(self.operators)
        outputs = [self.value(size, index) for size in sizes]
        fields.setdefault("target", f"{phase}.{len(inputs)}")
        self.operators.append(
            Operator(
                name=f"o{index}", phase=phase, inputs=tuple(inputs), outputs=tuple(outputs), seconds=seconds, **fields
            )
        )
        return outputs

    def value(self, size_bytes: int, producer: int, kind: ValueKind = "activation", **fields: Any) -> int:
        """Append a value without telling its producer."""
        self.values.append(Value(size_bytes, producer, kind, **fields))
        return len(self.values) - 1

    def graph(self, **fields: Any) -> Graph:
        """The finished graph."""
        return Graph(tuple(self.operators), tuple(self.values), **fields)


def chain(n: int) -> Shape:
    """o0 → o1 → … : the graph of Chen and of Griewank."""
    return [(i - 1,) if i else () for i in range(n)]


def chain_with_skips(rng: random.Random, n: int) -> Shape:
    """A chain in which some operators also read one from further back."""
    shape = chain(n)
    for i in range(2, n):
        if rng.random() < 0.35:
            shape[i] = tuple(sorted({i - 1, rng.randrange(i - 1)}))
    return shape


def layered(rng: random.Random, n: int) -> Shape:
    """Layers of one to three operators; each reads one or two of the layer before."""
    shape: Shape = [()]
    previous = [0]
    while len(shape) < n:
        width = min(rng.randint(1, 3), n - len(shape))
        layer = list(range(len(shape), len(shape) + width))
        shape += [tuple(sorted(rng.sample(previous, min(len(previous), rng.randint(1, 2))))) for _ in layer]
        previous = layer
    return shape


def series_parallel(rng: random.Random, n: int) -> Shape:
    """Blocks that fork into two branches and join again."""
    shape: Shape = [()]
    while len(shape) < n:
        fork = len(shape) - 1
        if n - len(shape) >= 3 and rng.random() < 0.6:
            shape += [(fork,), (fork,), (fork + 1, fork + 2)]
        else:
            shape.append((fork,))
    return shape


def u_shaped(rng: random.Random, n: int) -> Shape:
    """Down and up again; each operator on the way up reads its partner on the way down."""
    shape = chain(n)
    for i in range((n + 1) // 2 + rng.randint(0, 1), n):
        partner = n - 1 - i
        shape[i] = tuple(sorted({i - 1, partner}))
    return shape


def dense(rng: random.Random, n: int) -> Shape:
    """Each operator reads up to three of those before it."""
    return [tuple(sorted(rng.sample(range(i), min(i, rng.randint(1, 3))))) for i in range(n)]


def disconnected(rng: random.Random, n: int) -> Shape:
    """Two chains that have nothing to do with one another, interleaved."""
    return [(i - 2,) if i >= 2 else () for i in range(n)]


SHAPES: dict[str, Callable[[random.Random, int], Shape]] = {
    "chain": lambda rng, n: chain(n),
    "chain_with_skips": chain_with_skips,
    "layered": layered,
    "series_parallel": series_parallel,
    "u_shaped": u_shaped,
    "dense": dense,
    "disconnected": disconnected,
}


def forward_graph(shape: Shape, rng: random.Random, features: Features = PLAIN) -> Graph:
    """A graph of one phase."""
    builder = Builder()
    _forward(builder, shape, rng, features)
    return builder.graph(resident_bytes={"parameters": features.resident_bytes})


def joint_graph(shape: Shape, rng: random.Random, features: Features = PLAIN) -> Graph:
    """A training step: the shape as forward phase, a loss if asked for, and one backward operator per operator."""
    builder = Builder()
    made = _forward(builder, shape, rng, features)
    readers: list[list[int]] = [[] for _ in shape]
    for index, before in enumerate(shape):
        for producer in before:
            readers[producer].append(index)
    ends = [made[i][0] for i in range(len(shape)) if not readers[i]]
    if features.loss:
        ends = builder.add("loss", ends, [_size(rng, features)], 1.0)
        ends = builder.add("loss", ends, [_size(rng, features)], 1.0)
    arriving: list[list[int]] = [[] for _ in shape]  # gradients of each operator's output
    for index in range(len(shape) - 1, -1, -1):
        saved = [v for producer in shape[index] for v in made[producer][:1]] + made[index]
        saved = [v for v in saved if rng.random() < 0.7]
        inputs = list(dict.fromkeys((arriving[index] or ends) + saved))
        if rng.random() < features.gradient_reads:
            inputs += [v for v, value in enumerate(builder.values) if value.kind == "gradient"][-1:]
        sizes = [_size(rng, features) for _ in shape[index]] or [0]
        extras = _extras(builder, inputs, sizes, rng, features)
        outputs = builder.add("backward", inputs, sizes, _seconds(rng), **extras)
        for producer, value in zip(shape[index], outputs, strict=False):
            arriving[producer].append(value)
        if rng.random() < features.gradients:
            _add_gradient(builder, rng, features)
    _postpone_deliveries(builder, rng, features)
    return builder.graph(
        resident_bytes={"parameters": features.resident_bytes},
        accumulated_gradient_bytes=sum(v.size_bytes for v in builder.values if v.kind == "gradient"),
        gradient_accumulation=features.gradient_accumulation,
    )


def random_graph(seed: int, n: int = 5, features: Features = PLAIN, joint: bool = True) -> Graph:
    """The graph of a seed: its shape is drawn as well."""
    rng = random.Random(seed)
    shape = SHAPES[rng.choice(sorted(SHAPES))](rng, n)
    return (joint_graph if joint else forward_graph)(shape, rng, features)


def training_chain(n: int, size_bytes: int = 10, seconds: float = 1.0) -> Graph:
    """A chain of `n` equal layers: each backward operator reads its layer's input and output."""
    builder = Builder()
    made = [-1]
    for index in range(n):
        made += builder.add("forward", made[-1:] if index else [], [size_bytes], seconds)
    gradient: list[int] = []
    for index in range(n, 0, -1):
        inputs = gradient + [v for v in made[index - 1 : index + 1] if v >= 0]
        gradient = builder.add("backward", inputs, [size_bytes], seconds)
    return builder.graph(name=f"chain of {n}")


def _forward(builder: Builder, shape: Shape, rng: random.Random, features: Features) -> list[list[int]]:
    made: list[list[int]] = []
    for before in shape:
        inputs = [rng.choice(made[i]) for i in before]
        sizes = [_size(rng, features)]
        if rng.random() < features.several_outputs:
            sizes.append(_size(rng, features))
        extras = _extras(builder, inputs, sizes, rng, features)
        made.append(builder.add("forward", inputs, sizes, _seconds(rng), **extras))
        if rng.random() < features.outputs:
            first = made[-1][0]
            builder.values[first] = Value(builder.values[first].size_bytes, len(builder.operators) - 1, "output")
    return made


def _extras(
    builder: Builder, inputs: Sequence[int], sizes: list[int], rng: random.Random, features: Features
) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if rng.random() < features.workspace:
        extras["workspace_bytes"] = rng.randint(1, 6)
    if rng.random() < features.random_state:
        extras["random_state_bytes"] = rng.randint(1, 4)
    if rng.random() < features.not_recomputable:
        extras.update(recomputable=False, keep_reason="it changes a buffer")
    if inputs and rng.random() < features.in_place:
        source = rng.choice(list(inputs))
        sizes[0] = builder.values[source].size_bytes
        extras["in_place"] = ((source, len(builder.values)),)
    return extras


def _add_gradient(builder: Builder, rng: random.Random, features: Features) -> None:
    """Give the operator added last a gradient among its outputs, delivered at once."""
    index = len(builder.operators) - 1
    size = rng.randint(1, 9)
    copy = size if rng.random() < features.delivery_copy else 0
    value = builder.value(size, index, "gradient", delivered_after=index, delivery_copy_bytes=copy)
    last = builder.operators[-1]
    builder.operators[-1] = dataclasses.replace(last, outputs=(*last.outputs, value))


def _postpone_deliveries(builder: Builder, rng: random.Random, features: Features) -> None:
    """Postpone the delivery of some gradients (tied weights wait for their last contribution)."""
    last = len(builder.operators) - 1
    for index, value in enumerate(builder.values):
        if value.delivered_after is not None and rng.random() < features.late_delivery:
            late = rng.randint(value.delivered_after, last)
            builder.values[index] = dataclasses.replace(value, delivered_after=late)


def _size(rng: random.Random, features: Features) -> int:
    return 0 if rng.random() < features.zero_bytes else rng.randint(1, 12)


def _seconds(rng: random.Random) -> float:
    return float(rng.randint(1, 9))

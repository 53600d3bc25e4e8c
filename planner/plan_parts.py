"""The parts of a plan file that describe where the plan comes from and what it was made for.

All of them are plain data without torch: shapes are tuples of integers, dtypes are names such as `float32`. They are
stored in a form in which a difference can be spelled out, because "the fingerprint does not match" helps nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from planner._version import __version__


def _plain(item: Any) -> Any:
    """Plain JSON data as a copy of its own, so that a plan equals what is read back from its file."""
    return json.loads(json.dumps(item, allow_nan=False))


def _infinity(item: Any) -> Any:
    return float("inf") if isinstance(item, str) and item == "inf" else item


Bytes: TypeAlias = Annotated[int, Field(strict=True, ge=0)]
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0)]
Seconds: TypeAlias = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction: TypeAlias = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
FractionOrInfinity: TypeAlias = Annotated[
    float,
    Field(strict=True, ge=0),  # ge=0 refuses NaN
    BeforeValidator(_infinity),
    PlainSerializer(lambda number: "inf" if number == float("inf") else number, when_used="json"),
]
"""JSON has no infinity: it is written as the text `inf`. NaN is refused everywhere."""

PlainDict: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_plain)]
ParameterRow: TypeAlias = tuple[str, tuple[Count, ...], str, bool]
"""Name, shape, dtype and whether the parameter requires a gradient."""


class Part(BaseModel):
    """Base of all parts: frozen, and strict about unknown fields, so that a typing error is no silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Producer(Part):
    """The program that wrote a plan."""

    name: str = "checkpoint-planner"
    version: str = __version__


class Environment(Part):
    """Where the plan was made. It is for reports: a plan may be used elsewhere, since the graph decides."""

    python: str
    torch: str
    platform: str
    device: str
    default_dtype: str


class ModelIdentity(Part):
    """The model that the plan was made for: its class and its parameters, by name."""

    class_name: str
    parameters: tuple[ParameterRow, ...]
    parameter_fingerprint: str

    @classmethod
    def of(cls, class_name: str, parameters: Iterable[Sequence[Any]]) -> ModelIdentity:
        """Build an identity from rows of (name, shape, dtype, requires_grad); the fingerprint is computed here."""
        rows = tuple((str(n), tuple(int(s) for s in shape), str(d), bool(g)) for n, shape, d, g in parameters)
        return cls(class_name=class_name, parameters=rows, parameter_fingerprint=parameter_fingerprint(rows))

    def differences(self, other: ModelIdentity) -> list[str]:
        """What `other`, the model at hand, has otherwise; one sentence per difference, empty if there is none."""
        found: list[str] = []
        classes: list[str] = []
        if self.class_name != other.class_name:
            classes.append(f"the plan is for {self.class_name}, the model is {other.class_name}")
        mine = {row[0]: row for row in self.parameters}
        theirs = {row[0]: row for row in other.parameters}
        found += [f"parameter {name!r} of the plan is missing in the model" for name in mine if name not in theirs]
        found += [f"parameter {name!r} of the model is not in the plan" for name in theirs if name not in mine]
        for name in mine.keys() & theirs.keys():
            for what, a, b in zip(("", "shape", "dtype", "requires_grad"), mine[name], theirs[name], strict=True):
                if a != b:
                    found.append(f"parameter {name!r} has {what} {b}, the plan has {a}")
        order = [row[0] for row in self.parameters] != [row[0] for row in other.parameters]
        if not found and order:
            found.append("the parameters are the same, in another order")
        return classes + sorted(found)


class TensorInput(Part):
    """A tensor among the example inputs; `path` is where it stands in the arguments, such as `args[0]['ids']`."""

    path: str
    shape: tuple[Count, ...]
    dtype: str

    def describe(self) -> str:
        """A short form for messages: `float32[2, 3]`."""
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class OtherInput(Part):
    """An argument that is no tensor; `value` is its `repr`."""

    path: str
    value: str

    def describe(self) -> str:
        """A short form for messages."""
        return self.value if len(self.value) <= 60 else f"{self.value[:57]}..."


InputRow: TypeAlias = TensorInput | OtherInput

LossLocation: TypeAlias = Literal["inside the model", "loss_fn", "outside the budget"]


class LossPlace(Part):
    """Where the loss is computed, and which outputs of the graph it comes from."""

    location: LossLocation
    outputs: tuple[Count, ...]
    note: str = ""


class BudgetRequest(Part):
    """What was asked for, in the user's words, and what the bytes must cover, line by line."""

    requested: str
    covers: tuple[tuple[str, Bytes], ...] = ()


def parameter_fingerprint(rows: Iterable[Sequence[Any]]) -> str:
    """Hash over names, shapes, dtypes and requires_grad of all parameters, in order."""
    return hashlib.sha256(json.dumps([list(row) for row in rows], separators=(",", ":")).encode()).hexdigest()[:32]


def input_differences(planned: Sequence[InputRow], given: Sequence[InputRow]) -> list[str]:
    """What differs between the inputs of a plan and those at hand; empty if nothing does."""
    mine: Mapping[str, InputRow] = {row.path: row for row in planned}
    theirs: Mapping[str, InputRow] = {row.path: row for row in given}
    found = [f"input {path} ({row.describe()}) is missing" for path, row in mine.items() if path not in theirs]
    found += [f"input {path} ({row.describe()}) is not in the plan" for path, row in theirs.items() if path not in mine]
    for path, row in mine.items():
        if path in theirs and theirs[path] != row:
            found.append(f"input {path} is {theirs[path].describe()}, the plan has {row.describe()}")
    return found

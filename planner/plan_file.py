"""The plan: everything that one decision consists of, and its form as a JSON file.

A plan carries the graph that it was made on and the schedule that it chose, so that it can be shown, simulated and
checked without the model and without torch. It is judged whenever one comes into being, by construction or from a
file: the graph and the schedule are rebuilt, the fingerprints compared, the schedule simulated. A plan that is over its
budget, or that states another peak or overhead than the simulator finds, cannot be constructed.

The file is JSON, one top-level field per line; integers are bytes. `schema_version` is `major.minor`: another major
version is refused, so is any unknown field. `checksum` is over all other fields, and says at once that a file was
changed by hand. Files are replaced atomically: whoever reads one sees the old plan or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from graph_capture.graph import Compiler, Graph
from planner.errors import InvalidPlanError, PlanFileError
from planner.pins import Pins
from planner.plan_judge import Claims, judge
from planner.plan_parts import (
    BudgetRequest,
    Bytes,
    Count,
    Environment,
    Fraction,
    FractionOrInfinity,
    InputRow,
    LossPlace,
    ModelIdentity,
    PlainDict,
    Producer,
    Seconds,
)
from solvers.schedule import Schedule
from solvers.simulator import Simulation

SCHEMA_VERSION = "1.1"
"""Major and minor. A minor version adds fields; a major one changes what a field means."""

_SINCE_MINOR = {"pins": 1}
"""Fields that a file of an older minor version does not have."""

StrictIndex = Annotated[int, Field(strict=True)]


def _graph_data(graph: Any) -> Any:
    return graph.to_dict() if isinstance(graph, Graph) else graph


def _schedule_data(schedule: Any) -> Any:
    return schedule.to_list() if isinstance(schedule, Schedule) else schedule


class Plan(BaseModel):
    """A schedule for one model, one set of inputs and one budget; frozen, and verified on construction.

    **Fields:** (fractions are of the store-all step's seconds; all bytes include what is resident)

    - `program_fingerprint`: of the captured program; `structure_fingerprint` and `fingerprint`: of the graph.
    - `loss_operators`: how many operators of the graph the caller runs as the loss.
    - `status`, `search_class`, `bound_scope`: how the solver ended, among which schedules it searched, and for which
      schedules `lower_bound` holds. `gap` is overhead minus lower bound.
    - `eager_peak_source`: how `eager_peak_bytes` is known. A percentage of a budget refers to it.
    - `first_peak_bytes`, `later_peak_bytes`: peaks of a first and of a later micro-batch; `regime` says which binds.
    - `graph`, `schedule`: plain data; :meth:`to_graph` and :meth:`to_schedule` give the objects. The constructor also
      takes the objects themselves.
    - `pins`: the modules that were to be kept and to be recomputed (:mod:`planner.pins`); since schema 1.1.
    - `settings`: how to plan again after a change: solver and its options, device, costs, gradient
      accumulation, extra bytes.

    Raises :class:`~planner.errors.InvalidPlanError` if the plan contradicts itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: str = SCHEMA_VERSION
    producer: Producer = Producer()
    environment: Environment
    model: ModelIdentity
    inputs: tuple[InputRow, ...]
    training: bool
    loss: LossPlace
    budget: BudgetRequest
    program_fingerprint: str
    structure_fingerprint: str
    fingerprint: str
    loss_operators: Count
    solver: str
    status: Literal["OPTIMAL", "FEASIBLE"]
    search_class: str
    bound_scope: str
    budget_bytes: Bytes
    eager_peak_bytes: Bytes
    eager_peak_source: str
    store_all_peak_bytes: Bytes
    predicted_peak_bytes: Bytes
    first_peak_bytes: Bytes
    later_peak_bytes: Bytes
    regime: Literal["first", "later"]
    overhead: Fraction
    lower_bound: FractionOrInfinity
    gap: Fraction
    solve_seconds: Seconds
    capture_seconds: Seconds
    step_seconds: Seconds
    message: str = ""
    notes: tuple[str, ...] = ()
    pins: Pins = Pins()
    settings: PlainDict
    schedule: Annotated[tuple[StrictIndex | tuple[StrictIndex, StrictIndex], ...], BeforeValidator(_schedule_data)]
    graph: Annotated[PlainDict, BeforeValidator(_graph_data)]

    _graph: Graph = PrivateAttr()
    _schedule: Schedule = PrivateAttr()
    _simulation: Simulation = PrivateAttr()
    _store_all: Simulation = PrivateAttr()

    @property
    def compiler(self) -> Compiler:
        """Whose kernels the plan was made for."""
        return cast("Compiler", self.settings.get("compiler", "eager"))

    def model_post_init(self, context: Any, /) -> None:
        """Judge the plan; nothing that contradicts itself leaves the constructor."""
        claims = Claims(
            budget_bytes=self.budget_bytes,
            store_all_peak_bytes=self.store_all_peak_bytes,
            predicted_peak_bytes=self.predicted_peak_bytes,
            first_peak_bytes=self.first_peak_bytes,
            later_peak_bytes=self.later_peak_bytes,
            regime=self.regime,
            overhead=self.overhead,
            lower_bound=self.lower_bound,
            gap=self.gap,
            step_seconds=self.step_seconds,
            loss_operators=self.loss_operators,
            fingerprint=self.fingerprint,
            structure_fingerprint=self.structure_fingerprint,
            parameters=self.model.parameters,
            parameter_fingerprint=self.model.parameter_fingerprint,
            pins=self.pins,
        )
        self._graph, self._schedule, self._simulation, self._store_all = judge(self.graph, self.schedule, claims)

    def to_graph(self) -> Graph:
        """The graph that the plan was made on; the same object at every call."""
        return self._graph

    def to_schedule(self) -> Schedule:
        """The schedule; the same object at every call."""
        return self._schedule

    def simulation(self) -> Simulation:
        """What the simulator says of the schedule: peaks, seconds and the memory timeline."""
        return self._simulation

    def store_all_simulation(self) -> Simulation:
        """What the simulator says of the step without recomputation."""
        return self._store_all

    @property
    def identity(self) -> str:
        """A text that is equal for plans that run the same schedule of the same graph within the same budget."""
        return f"{self.fingerprint} {self.budget_bytes} {self.schedule}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path`, atomically: `path` is replaced when the whole plan is on the disk."""
        target = Path(path)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes files that only their owner can read; a plan is as readable as any file made here.
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def to_json(self) -> str:
        """The text of the plan file."""
        fields = self.model_dump(mode="json")
        fields["checksum"] = _checksum(fields)
        rows = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in fields.items())
        return "{\n" + ",\n".join(rows) + "\n}\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file; raises :class:`~planner.errors.PlanFileError` where it cannot be used, and says why."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PlanFileError(f"{os.fspath(path)}: this is no text file, so no plan ({error.reason})") from error
        except PlanFileError as error:
            raise PlanFileError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read the text of a plan file; raises :class:`~planner.errors.PlanFileError`."""
        fields = _parse(text)
        _check_version(fields)
        checksum = fields.pop("checksum", None)
        minor = int(fields["schema_version"].split(".")[1])
        expected = [name for name in cls.model_fields if minor >= _SINCE_MINOR.get(name, 0)]
        missing = [name for name in expected if name not in fields]
        if missing:
            raise PlanFileError(f"the field {missing[0]!r} is missing; the file was changed or cut off. {_PLAN_AGAIN}")
        try:
            plan = cls.model_validate(fields)
        except ValidationError as error:
            raise PlanFileError(_explain(error, fields)) from error
        except InvalidPlanError as error:
            raise PlanFileError(f"{error} (changed by hand?). {_PLAN_AGAIN}") from error
        if checksum != _checksum(fields):
            raise PlanFileError(f"the checksum does not match: the file was changed after it was saved. {_PLAN_AGAIN}")
        return plan

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Plan:
        """A copy with some fields changed, judged like any other plan."""
        return type(self).model_validate({**self.model_dump(), **(update or {})})

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.budget_bytes, self.schedule))

    def __eq__(self, other: object) -> bool:
        return self.model_dump() == other.model_dump() if isinstance(other, Plan) else NotImplemented

    def __repr__(self) -> str:
        return (
            f"<Plan for {self.model.class_name}: {self.solver}, {self.status}, overhead {self.overhead:.4f}, "
            f"peak {self.predicted_peak_bytes:,} of {self.budget_bytes:,} bytes>"
        )

    def __str__(self) -> str:
        from planner.plan_table import plan_text
        from planner.report import report_on
        from planner.report.text import report_text

        return f"{plan_text(self)}\n\n{report_text(report_on(self))}"


_PLAN_AGAIN = "Make the plan again with plan(...) or `checkpoint-planner plan`"


def _umask() -> int:
    # There is no way to read it without setting it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _checksum(fields: Mapping[str, Any]) -> str:
    text = json.dumps({k: fields[k] for k in sorted(fields) if k != "checksum"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _parse(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        cut = text.strip()
        what = "empty" if not cut else "cut off" if cut.startswith("{") and not cut.endswith("}") else "not JSON"
        raise PlanFileError(f"the file is {what} ({error}), so it is no plan. {_PLAN_AGAIN}") from error
    if not isinstance(data, dict):
        raise PlanFileError(f"the file holds a JSON {type(data).__name__}, not a plan. {_PLAN_AGAIN}")
    return cast(dict[str, Any], data)


def _check_version(fields: Mapping[str, Any]) -> None:
    version = fields.get("schema_version")
    if version is None:
        raise PlanFileError(f"there is no schema_version, so this is no plan. {_PLAN_AGAIN}")
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise PlanFileError(f'schema_version is {version!r}; it must look like "{SCHEMA_VERSION}". {_PLAN_AGAIN}')
    if parts[0] != SCHEMA_VERSION.split(".")[0]:
        raise PlanFileError(
            f"the plan has schema version {version}, this program reads {SCHEMA_VERSION}. "
            "Use a checkpoint-planner of the version that wrote it, or make the plan again with this one"
        )


def _explain(error: ValidationError, fields: Mapping[str, Any]) -> str:
    """One sentence for pydantic's list of complaints; the first one is enough to act on."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] == "extra_forbidden":
        newer = fields["schema_version"] != SCHEMA_VERSION
        why = f"schema {fields['schema_version']} is newer than {SCHEMA_VERSION}" if newer else "changed by hand?"
        return f"unknown field {where!r} ({why}). {_PLAN_AGAIN}"
    if first["type"] == "missing":
        return f"the field {where!r} is missing; the file was changed or cut off. {_PLAN_AGAIN}"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return f"field {where!r}: {first['msg']}, found {shown} (changed by hand?). {_PLAN_AGAIN}"

"""The plan: what cannot be constructed, what survives a round trip, and every kind of damaged file."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from planner.errors import InvalidPlanError, PlanFileError, PlannerError
from planner.plan_file import SCHEMA_VERSION, Plan
from planner.plan_parts import ModelIdentity, OtherInput, TensorInput, input_differences
from solvers.schedule import Schedule
from tests.planner.plans import RECOMPUTE_ONE, chain, make_plan, plan_fields


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def edited(plan: Plan, edit: Callable[[dict[str, Any]], None]) -> str:
    """The text of a plan file after an edit by hand."""
    fields = json.loads(plan.to_json())
    edit(fields)
    return json.dumps(fields)


# --- round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    plan = make_plan()
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert str(loaded) == str(plan)
    assert loaded.to_json() == plan.to_json() == path.read_text()
    assert loaded.to_graph() == chain()
    assert loaded.to_graph() is loaded.to_graph()
    assert loaded.to_schedule() is loaded.to_schedule()
    assert loaded.to_schedule().order == (*RECOMPUTE_ONE, 12)
    assert loaded.simulation().peak_bytes == loaded.predicted_peak_bytes


def test_takes_the_objects_themselves() -> None:
    fields = plan_fields()
    graph = chain()
    schedule = Schedule.from_list(fields["schedule"])
    assert Plan(**{**fields, "graph": graph, "schedule": schedule}) == Plan(**fields)


def test_infinite_bound_survives_and_is_plain_json(path: Path) -> None:
    plan = make_plan(lower_bound=math.inf, gap=0.0)
    plan.save(path)
    assert json.loads(path.read_text())["lower_bound"] == "inf"
    assert "Infinity" not in path.read_text()
    assert Plan.load(path).lower_bound == math.inf
    assert "infinite" in str(plan)


def test_other_formatting_of_the_same_json_is_the_same_plan(path: Path) -> None:
    plan = make_plan()
    path.write_text(json.dumps(json.loads(plan.to_json()), indent=7, sort_keys=True))
    assert Plan.load(path) == plan


def test_deep_copy_and_pickle() -> None:
    plan = make_plan()
    assert copy.deepcopy(plan) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


@given(st.integers(2, 7), st.lists(st.integers(0, 6), max_size=4), st.booleans())
def test_any_legal_order_round_trips(layers: int, again: list[int], accumulate: bool) -> None:
    graph = chain(layers, gradient_accumulation=accumulate)
    forward = list(range(layers))
    # Recomputed in ascending order before the backward: everything that they need is there.
    order = [*forward, *sorted({i for i in again if i < layers - 1}), *range(layers, len(graph))]
    plan = Plan(**plan_fields(graph, order))
    assert Plan.from_json(plan.to_json()) == plan


# --- what cannot be constructed ---------------------------------------------------------------------------------------


def test_frozen() -> None:
    plan = make_plan()
    with pytest.raises(ValidationError):
        plan.budget_bytes = 1  # type: ignore[misc]


def test_a_plan_over_its_budget_cannot_be_constructed() -> None:
    fields = plan_fields()
    with pytest.raises(InvalidPlanError, match="over its budget"):
        Plan(**{**fields, "budget_bytes": fields["predicted_peak_bytes"] - 1})
    assert Plan(**{**fields, "budget_bytes": fields["predicted_peak_bytes"]})


def test_nor_by_copying() -> None:
    plan = make_plan()
    with pytest.raises(InvalidPlanError, match="over its budget"):
        plan.model_copy(update={"budget_bytes": 1})
    assert plan.model_copy(update={"message": "hello"}).message == "hello"


def test_a_budget_that_only_the_first_micro_batch_meets_is_exceeded() -> None:
    graph = chain(gradient_accumulation=True)
    fields = plan_fields(graph, (*RECOMPUTE_ONE, 12))
    assert fields["regime"] == "later"
    assert fields["first_peak_bytes"] < fields["later_peak_bytes"]
    with pytest.raises(InvalidPlanError, match="over its budget"):
        Plan(**{**fields, "budget_bytes": fields["first_peak_bytes"]})


@pytest.mark.parametrize(
    ("field", "change", "complaint"),
    [
        ("predicted_peak_bytes", lambda v: v - 1, "predicted peak"),
        ("first_peak_bytes", lambda v: v - 1, "first micro-batch"),
        ("later_peak_bytes", lambda v: v + 1, "later micro-batch"),
        ("store_all_peak_bytes", lambda v: v + 1, "store-all peak"),
        ("regime", lambda v: "later", "regime"),
        ("overhead", lambda v: v / 2, "overhead"),
        ("gap", lambda v: v / 2, "gap"),
        ("step_seconds", lambda v: v * 2, "step's seconds"),
        ("loss_operators", lambda v: 3, "loss operators"),
        ("fingerprint", lambda v: "0" * 32, "fingerprint"),
        ("structure_fingerprint", lambda v: "0" * 32, "structure fingerprint"),
        ("schedule", lambda v: v[1:], "not legal"),
        ("schedule", lambda v: [0, *v], "not legal"),
        ("schedule", lambda v: [*v, 999], "not legal"),
        ("schedule", lambda v: [*v, -1000], "not legal"),
        ("schedule", lambda v: [[v[0], 5], *v[1:]], "not legal"),
        ("schedule", lambda v: [], "not legal"),
        ("graph", lambda v: {**v, "operators": v["operators"][:-1]}, "graph cannot be rebuilt"),
        ("graph", lambda v: {**v, "operators": 3}, "graph cannot be rebuilt"),
        ("graph", lambda v: {**v, "values": [1, 2]}, "graph cannot be rebuilt"),
        ("graph", lambda v: {**v, "surprise": 1}, "graph cannot be rebuilt"),
        ("graph", lambda v: {}, "graph cannot be rebuilt"),
        ("graph", lambda v: {**v, "resident_bytes": {"parameters": 0, "inputs": 10}}, "fingerprint"),
    ],
)
def test_contradictions_are_refused(field: str, change: Callable[[Any], Any], complaint: str) -> None:
    fields = plan_fields()
    with pytest.raises(InvalidPlanError, match=complaint) as caught:
        Plan(**{**fields, field: change(fields[field])})
    assert isinstance(caught.value, PlannerError)
    text = edited(make_plan(), lambda data: data.update({field: change(data[field])}))
    with pytest.raises(PlanFileError, match=complaint):
        Plan.from_json(text)


@pytest.mark.parametrize(
    "field", ["overhead", "lower_bound", "gap", "solve_seconds", "capture_seconds", "step_seconds"]
)
def test_nan_is_never_a_number(field: str) -> None:
    with pytest.raises(ValidationError):
        make_plan(**{field: math.nan})


def test_nan_in_settings_is_refused() -> None:
    with pytest.raises(ValidationError):
        make_plan(settings={"gap": math.nan})


# --- files ------------------------------------------------------------------------------------------------------------


def refuse(path: Path, text: str | bytes, *said: str) -> None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanFileError) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message) < 600
    for part in said:
        assert part in message


def test_every_truncation_is_refused(path: Path) -> None:
    text = make_plan().to_json()
    for length in [0, 1, 2, 10, len(text) // 2, *range(len(text) - 40, len(text) - 2)]:
        path.write_text(text[:length])
        with pytest.raises(PlanFileError):
            Plan.load(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("{", "cut off"),
        ("hello", "not JSON"),
        ("null", "JSON NoneType"),
        ("[]", "JSON list"),
        ("{}", "no schema_version"),
        ('{"schema_version": 1}', "must look like"),
        ('{"schema_version": "one"}', "must look like"),
        ('{"schema_version": "1"}', "must look like"),
        ('{"schema_version": "1.0"}', "missing"),
        ("[" * 200_000, "not JSON"),
        ('{"schema_version": ' + "9" * 5000 + "}", "not JSON"),
        (b"\xff\xfe\x00", "no text file"),
        (b"\x80\x04K\x01.", "no text file"),
    ],
)
def test_what_is_no_plan_at_all(path: Path, text: str | bytes, said: str) -> None:
    refuse(path, text, said)


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0"])
def test_another_major_version_says_what_to_do(path: Path, version: str) -> None:
    text = edited(make_plan(), lambda data: data.update(schema_version=version, something_new=1))
    refuse(path, text, f"schema version {version}", f"reads {SCHEMA_VERSION}", "make the plan again")


def test_unknown_fields(path: Path) -> None:
    refuse(path, edited(make_plan(), lambda d: d.update(colour="red")), "unknown field 'colour'", "changed by hand")
    newer = edited(make_plan(), lambda d: d.update(colour="red", schema_version="1.7"))
    refuse(path, newer, "unknown field 'colour'", "schema 1.7 is newer")
    refuse(path, edited(make_plan(), lambda d: d["model"].update(colour="red")), "unknown field 'model.colour'")


@pytest.mark.parametrize("field", sorted(set(Plan.model_fields) - {"schema_version"}))
def test_every_missing_field_is_named(path: Path, field: str) -> None:
    refuse(path, edited(make_plan(), lambda data: data.pop(field)), f"the field {field!r} is missing")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("budget_bytes", "12GiB"),
        ("budget_bytes", 1.5),
        ("budget_bytes", True),
        ("budget_bytes", -1),
        ("budget_bytes", None),
        ("status", "INFEASIBLE"),
        ("status", "SPLENDID"),
        ("regime", "sometimes"),
        ("overhead", "5 %"),
        ("overhead", "inf"),
        ("lower_bound", "-inf"),
        ("schedule", "0123"),
        ("schedule", [0, "1"]),
        ("schedule", [[0, 1, 2]]),
        ("schedule", [1.0]),
        ("graph", []),
        ("loss", {"location": "elsewhere", "outputs": [], "note": ""}),
        ("inputs", [{"path": "args[0]"}]),
        ("model", {"class_name": "M", "parameters": [["w", [1], "float32"]], "parameter_fingerprint": ""}),
        ("notes", "a text"),
    ],
)
def test_wrong_types_name_the_field(path: Path, field: str, value: object) -> None:
    refuse(path, edited(make_plan(), lambda data: data.update({field: value})), field)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_are_no_json(path: Path, constant: str) -> None:
    text = edited(make_plan(), lambda data: data.update(gap="HERE")).replace('"HERE"', constant)
    refuse(path, text, constant)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lower_bound", 1e-3),
        ("eager_peak_bytes", 10**9),
        ("solver", "checkmate"),
        ("budget_bytes", 10**6),
        ("bound_scope", "everything"),
        ("notes", []),
        ("program_fingerprint", "another"),
        ("settings", {}),
    ],
)
def test_an_edit_that_contradicts_nothing_is_still_seen(path: Path, field: str, value: object) -> None:
    def edit(data: dict[str, Any]) -> None:
        data[field] = value
        data["gap"] = max(0.0, data["overhead"] - data["lower_bound"])

    refuse(path, edited(make_plan(), edit), "checksum")


def test_a_removed_checksum_is_seen(path: Path) -> None:
    refuse(path, edited(make_plan(), lambda data: data.pop("checksum")), "checksum")


def test_parameters_changed_by_hand(path: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["model"]["parameters"][0][1] = [3, 5]

    refuse(path, edited(make_plan(), edit), "parameter fingerprint")


def test_a_missing_file_is_the_usual_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "none.json")


@given(st.data())
def test_no_damage_of_single_characters_is_silent(data: st.DataObject) -> None:
    plan = make_plan()
    text = plan.to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:at] + data.draw(st.characters(codec="ascii")) + text[at + 1 :]
    try:
        loaded = Plan.from_json(damaged)
    except PlanFileError:
        return
    assert loaded == plan  # white space, or the same character


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saving_replaces_atomically(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan(message="old").save(path)

    def broken(source: object, target: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk gone"):
        make_plan(message="new").save(path)
    monkeypatch.undo()
    assert Plan.load(path).message == "old"
    assert os.listdir(path.parent) == [path.name]
    make_plan(message="new").save(path)
    assert Plan.load(path).message == "new"
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupted_write_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_plan().save(path)
    assert os.listdir(path.parent) == []


def test_saved_plans_are_as_readable_as_other_files(path: Path) -> None:
    make_plan().save(path)
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_saving_into_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_plan().save(tmp_path / "none" / "plan.json")


# --- what is printed, and differences ---------------------------------------------------------------------------------


def test_the_table_says_everything() -> None:
    text = str(make_plan(message="look here"))
    for part in (
        "models.Chain",
        "90% = 655 bytes",
        "40 bytes      40 bytes  parameters",
        "eager's peak",
        "store-all's peak",
        "predicted peak       650 bytes",
        "first micro-batch",
        "binds",
        "later micro-batch",
        "no gradient accumulation",
        "overhead             5.26 %: a step takes 1 s longer than without checkpointing (19 s, as priced for cpu)",
        "lower bound",
        "gap",
        "feasible",
        "ordered",
        "1 recomputed (1 extra executions)",
        "capture 1.00, solve 0.50",
        "look here",
        "a note",
    ):
        assert part in text


def test_repr_is_one_line() -> None:
    assert repr(make_plan()) == "<Plan for models.Chain: auto, FEASIBLE, overhead 0.0526, peak 650 of 655 bytes>"


def test_differences_between_models_are_spelled_out() -> None:
    planned = ModelIdentity.of("m.A", [("w", (2, 3), "float32", True), ("b", (3,), "float32", True)])
    assert planned.differences(planned) == []
    other = ModelIdentity.of("m.B", [("w", (2, 4), "float32", False), ("c", (3,), "float32", True)])
    assert planned.differences(other) == [
        "the plan is for m.A, the model is m.B",
        "parameter 'b' of the plan is missing in the model",
        "parameter 'c' of the model is not in the plan",
        "parameter 'w' has requires_grad False, the plan has True",
        "parameter 'w' has shape (2, 4), the plan has (2, 3)",
    ]
    swapped = ModelIdentity.of("m.A", [("b", (3,), "float32", True), ("w", (2, 3), "float32", True)])
    assert planned.differences(swapped) == ["the parameters are the same, in another order"]


def test_differences_between_inputs_are_spelled_out() -> None:
    planned = (TensorInput(path="args[0]", shape=(2, 3), dtype="int64"), OtherInput(path="kwargs['t']", value="1"))
    assert input_differences(planned, planned) == []
    given_inputs = (TensorInput(path="args[0]", shape=(4, 3), dtype="int64"), OtherInput(path="args[1]", value="1"))
    assert input_differences(planned, given_inputs) == [
        "input kwargs['t'] (1) is missing",
        "input args[1] (1) is not in the plan",
        "input args[0] is int64[4, 3], the plan has int64[2, 3]",
    ]

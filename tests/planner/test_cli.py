"""The command line: exit codes, one line per error, nothing half-written, and what it must not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import planner
from planner.cli.factory import make
from planner.cli.main import CHECK_FAILED, ERROR, INFEASIBLE, INTERRUPTED, OK, main
from planner.errors import FactoryError, InfeasibleBudgetError
from planner.plan_file import Plan
from solvers.checkmate import Checkmate
from solvers.store_all import StoreAll
from tests.planner.plans import chain, make_plan, plan_fields

ROOT = Path(__file__).parents[2]

FACTORIES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))
                                    for _ in range(layers))

    def forward(self, input):
        for layer in self.layers:
            input = input + layer(input)
        return input.square().mean()


def make_net(layers=4):
    torch.manual_seed(0)
    return Net(layers), (torch.ones(64, 16),)


def make_other():
    return make_net(3)


def make_evaluated():
    model, inputs = make_net()
    return model.eval(), inputs
"""


@pytest.fixture
def plan_path(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    return path


@pytest.fixture
def factory_file(tmp_path: Path) -> Path:
    """A factory that needs no torch, for a planner that is replaced."""
    path = tmp_path / "factories_without_torch.py"
    path.write_text(
        "def make():\n    return object(), {'x': 1}\n\ndef fail():\n    raise RuntimeError('no\\ncorpus')\n"
    )
    return path


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`planner.api.plan` replaced by one that notes its arguments and returns a plan."""
    calls: list[dict[str, Any]] = []

    def fake(model: Any, budget: Any, args: Any, kwargs: Any, **options: Any) -> Plan:
        calls.append({"model": model, "budget": budget, "args": args, "kwargs": kwargs, **options})
        return make_plan()

    monkeypatch.setattr("planner.api.plan", fake)
    return calls


def run(*arguments: str, python: tuple[str, ...] = ("-m", "planner.cli")) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *python, *arguments], capture_output=True, text=True, env=environment)


# --- what it imports --------------------------------------------------------------------------------------------------

HEAVY = ("torch", "ortools", "numba", "pydantic", "numpy", "networkx", "matplotlib", "jinja2", "rich")


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], ()),
        (["plan", "--help"], ()),
        (["--version"], ()),
        (["pareto", "--help"], ()),
        (["max-batch", "--help"], ()),
        (["minimum-budget", "--help"], ()),
        (["certify", "--help"], ()),
        (["solvers"], ()),
        (["show", "PLAN"], ("pydantic",)),
        (["show", "PLAN", "--json"], ("pydantic",)),
        (["compare", "PLAN", "PLAN"], ("pydantic",)),
    ],
)
def test_heavy_imports_are_late(arguments: list[str], allowed: tuple[str, ...], plan_path: Path) -> None:
    arguments = [str(plan_path) if a == "PLAN" else a for a in arguments]
    code = f"""
import sys
from planner.cli.main import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code
loaded = [m for m in {HEAVY!r} if m in sys.modules]
sys.stderr.write(f"{{code}} {{loaded}}")
"""
    result = run(python=("-c", code))
    code_text, _, loaded = result.stderr.partition(" ")
    assert code_text == "0"
    assert set(eval(loaded)) <= set(allowed)


# --- as a process -----------------------------------------------------------------------------------------------------


def test_help_names_verbs_and_exit_codes() -> None:
    result = run("--help")
    assert result.returncode == OK
    for word in ("plan", "show", "compare", "pareto", "check", "solvers", "infeasible"):
        assert word in result.stdout


def test_version() -> None:
    assert run("--version").stdout.strip() == f"checkpoint-planner {planner.__version__}"


def test_an_error_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    result = run("show", str(tmp_path / "none.json"))
    assert result.returncode == ERROR
    assert result.stdout == ""
    assert result.stderr == f"checkpoint-planner: {tmp_path / 'none.json'}: No such file or directory\n"


def test_traceback_on_demand(tmp_path: Path) -> None:
    result = run("show", str(tmp_path / "none.json"), "--traceback")
    assert result.returncode == ERROR
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("checkpoint-planner: ")


def test_a_reader_that_goes_away_is_no_traceback(plan_path: Path) -> None:
    code = f"""
import os, sys
from planner.cli.main import main
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
sys.exit(main(["show", {str(plan_path)!r}]))
"""
    result = run(python=("-c", code))
    assert result.stderr == ""


# --- pareto -----------------------------------------------------------------------------------------------------------


def test_pareto_of_a_plan_needs_no_torch(plan_path: Path, tmp_path: Path) -> None:
    arguments = ["pareto", str(plan_path), "--budgets", "100%", "90%", "650 bytes", "10%", "--json", "--solver", "auto"]
    code = f"import sys; from planner.cli.main import main; code = main({arguments!r}); "
    result = run(python=("-c", code + "sys.stderr.write(str((code, 'torch' in sys.modules)))"))
    assert result.stderr == "(0, False)"
    data = json.loads(result.stdout)
    assert [p["requested"] for p in data["points"]] == ["10%", "650 bytes", "90%", "100%"]
    assert [p["status"] for p in data["points"]] == ["INFEASIBLE", "OPTIMAL", "OPTIMAL", "OPTIMAL"]
    assert [p["overhead"] for p in data["points"]] == [None, pytest.approx(1 / 19), pytest.approx(1 / 19), 0.0]
    assert {o["label"] for o in data["others"]} >= {"store-all", "checkpoint every block", "chen-sqrt"}


def test_pareto_of_a_model(
    factory_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from planner.pareto import pareto

    calls: list[dict[str, Any]] = []

    def fake(model: Any, budgets: Any, args: Any, kwargs: Any, **options: Any) -> Any:
        calls.append({"budgets": [str(b) for b in budgets], "kwargs": kwargs, **options})
        return pareto(chain(), ["100%", "10%"], progress=options["progress"])

    monkeypatch.setattr(sys.modules["planner.pareto"], "pareto", fake)
    page, plot = tmp_path / "curve.html", tmp_path / "curve.svg"
    arguments = ["pareto", f"{factory_file}:make", "--budgets", "80%", "--device", "A100-40GB", "--time-limit", "3"]
    assert main([*arguments, "--html", str(page), "--plot", str(plot)]) == OK
    assert calls[0]["budgets"] == ["80%"]
    assert (calls[0]["device"], calls[0]["time_limit_seconds"], calls[0]["progress"]) == ("a100-40gb", 3.0, None)
    text = capsys.readouterr().out
    assert "optimal" in text
    assert "infeasible" in text
    assert "within 100%" in page.read_text()
    assert "</svg>" in plot.read_text()


# --- compare, and pictures --------------------------------------------------------------------------------------------


def test_compare(plan_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    Plan(**plan_fields(chain())).save(other)
    assert main(["compare", str(other), str(plan_path)]) == OK
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "a b b against a"
    assert "peak 750 bytes 650 bytes -100 bytes" in lines
    assert "layers.* 600 bytes 500 bytes 0 bytes 100 bytes 0 1 s" in lines
    assert main(["compare", str(other), str(plan_path), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["second"]["predicted_peak_bytes"] == 650
    assert data["comparison"]["modules"][0]["kept_bytes"] == [600, 500]


def test_plans_of_different_graphs_are_compared_with_a_note(
    plan_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    Plan(**plan_fields(chain(5))).save(other)
    assert main(["compare", str(other), str(plan_path)]) == OK
    assert "note: the plans are of different graphs" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["show", "compare"])
def test_reports_and_plots_are_written(verb: str, plan_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    page, plot = tmp_path / "report.html", tmp_path / "plot.svg"
    plans = [str(plan_path)] * (2 if verb == "compare" else 1)
    assert main([verb, *plans, "--html", str(page), "--plot", str(plot)]) == OK
    assert page.read_text().startswith("<!doctype html>")
    assert "</svg>" in plot.read_text()


def test_a_report_needs_no_torch(plan_path: Path, tmp_path: Path) -> None:
    arguments = ["show", str(plan_path), "--html", str(tmp_path / "report.html")]
    code = f"import sys; from planner.cli.main import main; code = main({arguments!r}); "
    result = run(python=("-c", code + "sys.stderr.write(str((code, 'torch' in sys.modules)))"))
    assert result.stderr == "(0, False)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--plot", "plot.bmp"], "a plot is written as .png, .svg, .pdf"),
        (["--plot", "/no/such/folder/plot.png"], "the plot cannot be written: there is no folder"),
        (["--html", "/no/such/folder/page.html"], "the report cannot be written: there is no folder"),
    ],
)
def test_pictures_are_refused_before_anything_is_read(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "none.json", *arguments]) == ERROR
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan_passes_everything_on(
    factory_file: Path, planned: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    code = main(
        [
            *("plan", f"{factory_file}:make", "--budget", "60%", "-o", str(output), "--solver", "store-all"),
            *("--device", "A100-40GB", "--time-limit", "7", "--no-gradient-accumulation"),
        ]
    )
    assert code == OK
    (call,) = planned
    assert str(call["budget"]) == "60%"
    assert (call["args"], call["kwargs"], call["loss_fn"]) == ((), {"x": 1}, None)
    assert call["solver"].name == "store-all"
    assert (call["device"], call["time_limit_seconds"], call["gradient_accumulation"]) == ("a100-40gb", 7.0, False)
    assert Plan.load(output) == make_plan()
    assert "predicted peak" in capsys.readouterr().out


def test_plan_leaves_the_solver_to_the_planner(factory_file: Path, planned: list[dict[str, Any]]) -> None:
    assert main(["plan", f"{factory_file}:make", "--budget", "1GiB"]) == OK
    assert planned[0]["solver"] is None
    assert planned[0]["time_limit_seconds"] is None
    assert planned[0]["gradient_accumulation"] is True
    assert planned[0]["start"] is None
    assert planned[0]["progress"] is None  # nobody looks: stderr is no terminal


def test_plan_starts_from_a_plan(
    factory_file: Path, plan_path: Path, planned: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", f"{factory_file}:make", "--budget", "1GiB", "--start"]
    assert main([*arguments, str(plan_path)]) == OK
    assert planned[0]["start"] == make_plan()
    assert main([*arguments, str(factory_file)]) == ERROR
    assert f"{factory_file}: the file is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["pareto"], ["minimum-budget", "--time-limit", "60"]])
def test_a_start_for_a_plans_graph(
    verb: list[str], plan_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.json"
    make_plan(**plan_fields(chain(4))).save(foreign)
    arguments = [*verb, str(plan_path), "--json", "--start"]
    assert main([*arguments, str(plan_path)]) == OK
    capsys.readouterr()
    assert main([*arguments, str(foreign)]) == ERROR
    assert "`start` is no schedule of this training step, but a plan for models.Chain" in capsys.readouterr().err


def test_a_time_limit_is_for_the_named_solver_of_a_plans_graph(
    plan_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def solve(self: Any, graph: Any, budget_bytes: int, hints: Any) -> Any:
        asked.append(self)
        return StoreAll().solve(graph, budget_bytes)

    monkeypatch.setattr(Checkmate, "solve", solve)
    assert main(["pareto", str(plan_path), "--solver", "checkmate", "--time-limit", "7", "--budgets", "100%"]) == OK
    assert [solver.time_limit_seconds for solver in asked] == [7.0]


def test_plan_as_json(factory_file: Path, planned: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{factory_file}:make", "--budget", "1GiB", "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["predicted_peak_bytes"] == make_plan().predicted_peak_bytes
    assert "graph" not in data
    assert data["output"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "8"], "has no unit"),
        (["--budget", "1GiB", "--solver", "chekmate"], "checkmate"),
        (["--budget", "1GiB", "--device", "h10"], "Known devices"),
        (["--budget", "1GiB", "-o", "/no/such/folder/plan.json"], "no folder"),
        (["--budget", "1GiB", "-o", "/"], "is a folder"),
    ],
)
def test_plan_refuses_before_it_works(
    arguments: list[str],
    said: str,
    factory_file: Path,
    planned: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", f"{factory_file}:make", *arguments]) == ERROR
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert planned == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["plan"],
        ["plan", "f.py:make"],
        ["plan", "f.py:make", "--budget", "1GiB", "--time-limit", "0"],
        ["plan", "f.py:make", "--budget", "1GiB", "--time-limit", "soon"],
        ["plan", "f.py:make", "--budget", "1GiB", "--time-limit", "nan"],
        ["show"],
        ["check", "plan.json"],
    ],
)
def test_wrong_arguments_are_errors_and_not_infeasible(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == ERROR
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_infeasible_is_two_and_writes_nothing(
    factory_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    def infeasible(*args: Any, **options: Any) -> Plan:
        raise InfeasibleBudgetError("too\nsmall", smallest_known_budget_bytes=77, floor_operator="mm")

    monkeypatch.setattr("planner.api.plan", infeasible)
    output = tmp_path / "out.json"
    arguments = ["plan", f"{factory_file}:make", "--budget", "1 byte", "-o", str(output)]
    assert main([*arguments, "--json"] if as_json else arguments) == INFEASIBLE
    captured = capsys.readouterr()
    assert captured.err == "checkpoint-planner: too small\n"
    assert not output.exists()
    if as_json:
        assert json.loads(captured.out)["smallest_known_budget_bytes"] == 77


def test_an_unexpected_error_names_its_type_and_an_interruption_its_code(
    factory_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **options: Any) -> Plan:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("planner.api.plan", broken)
    arguments = ["plan", f"{factory_file}:make", "--budget", "1GiB"]
    assert main(arguments) == ERROR
    assert "ZeroDivisionError: oh (--traceback shows where)" in capsys.readouterr().err

    def interrupted(*args: Any, **options: Any) -> Plan:
        raise KeyboardInterrupt

    monkeypatch.setattr("planner.api.plan", interrupted)
    assert main(arguments) == INTERRUPTED


# --- show and solvers -------------------------------------------------------------------------------------------------


def test_show(plan_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(plan_path)]) == OK
    text = capsys.readouterr().out
    assert str(make_plan()) in text
    assert "layers.{0-2,4-5}" in text
    assert "peak: 650 bytes" in text


def test_show_as_json(plan_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(plan_path), "--json"]) == OK
    data = json.loads(capsys.readouterr().out)
    assert data["report"]["modules"][0]["label"] == "layers.{0-2,4-5}"
    assert data["report"]["peak"]["operator"] == "b5"


def test_show_of_a_damaged_plan(plan_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_path.write_text(plan_path.read_text()[:100])
    assert main(["show", str(plan_path)]) == ERROR
    captured = capsys.readouterr()
    assert "cut off" in captured.err
    assert captured.err.count("\n") == 1


def test_solvers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solvers"]) == OK
    text = capsys.readouterr().out
    for name in ("auto", "snapshot", "checkmate", "store-all"):
        assert f"\n{name} " in text
    assert main(["solvers", "--json"]) == OK
    assert {"auto", "store-all"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}


# --- factories --------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, returned: str) -> str:
    path = tmp_path / "made_here.py"
    path.write_text(f"def make():\n    return {returned}\n\nnumber = 3\n")
    return f"{path}:make"


@pytest.mark.parametrize(
    ("returned", "args", "kwargs"),
    [
        ("'m'", (), {}),
        ("'m', (1, 2)", (1, 2), {}),
        ("'m', [1]", (1,), {}),
        ("'m', 1", (1,), {}),
        ("'m', {'a': 1}", (), {"a": 1}),
        ("'m', (1,), {'a': 2}", (1,), {"a": 2}),
        ("'m', (1,), None", (1,), {}),
        ("'m', (1,), {}, len", (1,), {}),
    ],
)
def test_forms_of_a_factory(tmp_path: Path, returned: str, args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    made = make(write(tmp_path, returned))
    assert (made.model, made.args, made.kwargs) == ("m", args, kwargs)
    assert made.loss_fn is (len if "len" in returned else None)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("'m', 1, 2, 3, 4", "returned 5 things"),
        ("('m',)", "returned 1 things"),
        ("'m', 1, {}", "args of type int"),
        ("'m', (), 3", "kwargs of type int"),
        ("'m', (), {}, 3", "loss_fn of type int"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_what_a_factory_must_not_return(tmp_path: Path, returned: str, said: str) -> None:
    with pytest.raises(FactoryError, match=said):
        make(write(tmp_path, returned))


def test_factories_that_are_not_there(tmp_path: Path) -> None:
    target = write(tmp_path, "1")
    place = target.removesuffix(":make")
    for wrong, said in [
        (place, "has no factory"),
        (f"{place}:", "has no factory"),
        (f"{place}:mak", "it has make"),
        (f"{place}:number", "must be a function"),
        (f"{place}x.py:make", "no file"),
        ("no_such_module_here:make", "cannot be imported: ModuleNotFoundError"),
    ]:
        with pytest.raises(FactoryError, match=said):
            make(wrong)
    (tmp_path / "broken.py").write_text("def (")
    with pytest.raises(FactoryError, match="SyntaxError"):
        make(f"{tmp_path / 'broken.py'}:make")


def test_a_module_by_name_and_a_neighbour_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make("json:dumps".replace("dumps", "JSONDecoder")).args == ()
    (tmp_path / "a_neighbour_of_it.py").write_text("x = 5\n")
    (tmp_path / "imports_its_neighbour.py").write_text(
        "import a_neighbour_of_it as n\ndef make():\n    return n.x, ()\n"
    )
    assert make(f"{tmp_path / 'imports_its_neighbour.py'}:make").model == 5


def test_a_failing_factory_is_one_line(factory_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{factory_file}:fail", "--budget", "1GiB"]) == ERROR
    error = capsys.readouterr().err
    assert "failed with RuntimeError: no corpus" in error
    assert error.count("\n") == 1


# --- the whole way, on a real model -----------------------------------------------------------------------------------


def test_plan_show_check_on_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factories = tmp_path / "factories_of_nets.py"
    factories.write_text(FACTORIES)
    output = str(tmp_path / "plan.json")
    assert main(["plan", f"{factories}:make_net", "--budget", "70%", "-o", output]) == OK
    assert main(["show", output]) == OK
    assert "layers.{" in capsys.readouterr().out
    assert main(["check", output, f"{factories}:make_net"]) == OK
    text = capsys.readouterr().out
    for word in ("fingerprint", "outputs", "gradients", "buffers", "peak", "operators", "the plan holds"):
        assert word in text
    assert "FAILED" not in text
    assert main(["check", output, f"{factories}:make_other"]) == CHECK_FAILED
    assert "'layers.3.0.bias' of the plan is missing" in capsys.readouterr().out
    assert main(["check", output, f"{factories}:make_evaluated", "--json"]) == CHECK_FAILED
    data = json.loads(capsys.readouterr().out)
    assert data["passed"] is False
    assert "evaluation mode" in data["results"][0]["detail"]


def test_an_infeasible_budget_on_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factories = tmp_path / "factories_for_infeasible.py"
    factories.write_text(FACTORIES)
    output = tmp_path / "plan.json"
    assert main(["plan", f"{factories}:make_net", "--budget", "20KiB", "-o", str(output)]) == INFEASIBLE
    error = capsys.readouterr().err
    assert "smallest budget known to work" in error
    assert "floor is set by operator" in error
    assert not output.exists()

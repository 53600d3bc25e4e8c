"""The public names: whoever adds or removes one has to say so here."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import planner
from graph_capture import errors as capture_errors
from planner import errors

NAMES = {
    "BatchTrial",
    "BlockPlans",
    "Budget",
    "BudgetError",
    "CaptureError",
    "Certificate",
    "CertificateError",
    "CertificateReport",
    "FactoryError",
    "InductorPeakWarning",
    "InfeasibleBudgetError",
    "InputsUnknownError",
    "InvalidPlanError",
    "LoopError",
    "MaxBatchSize",
    "NoScheduleError",
    "Pareto",
    "ParetoPoint",
    "PinError",
    "Plan",
    "PlanChangedWarning",
    "PlanFileError",
    "PlanMismatchError",
    "PlannerError",
    "RewriteError",
    "SelectivePolicy",
    "StepMeasurement",
    "UnsupportedModelError",
    "WatchError",
    "WatchReport",
    "WatchedStep",
    "__version__",
    "auto_checkpoint",
    "certify",
    "checkpoint_loop",
    "export_certificate",
    "export_policy",
    "format_bytes",
    "max_batch_size",
    "measure_step",
    "minimum_budget",
    "pareto",
    "parse_budget",
    "plan",
    "plan_blocks",
    "restore",
    "rewrite",
    "verify_certificate",
    "watch",
}


def test_the_names_are_these() -> None:
    assert set(planner.__all__) == NAMES
    assert list(planner.__all__) == sorted(planner.__all__)
    assert set(dir(planner)) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_exists_and_is_no_module(name: str) -> None:
    assert not isinstance(getattr(planner, name), ModuleType)


def test_importing_the_module_does_not_hide_the_function() -> None:
    code = "import planner.rewrite, planner.auto_checkpoint, planner; assert callable(planner.rewrite); "
    code += "from planner import rewrite, auto_checkpoint; assert callable(rewrite) and callable(auto_checkpoint)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        planner.nothing  # noqa: B018


def test_importing_is_light() -> None:
    code = "import sys, planner; print([m for m in ('torch', 'pydantic', 'numpy', 'ortools') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_reading_a_plan_needs_no_torch_and_no_solver() -> None:
    code = "import sys; from planner import Plan; print([m for m in ('torch', 'ortools', 'numba') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_every_error_is_exported() -> None:
    def defined(module: ModuleType) -> set[str]:
        return {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == module.__name__
        }

    assert defined(errors) | defined(capture_errors) <= NAMES
    assert defined(errors) | defined(capture_errors) | {"error_for_solution"} == set(errors.__all__)

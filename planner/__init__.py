"""Trains PyTorch models within a memory budget.

    from planner import plan, rewrite, Plan

    p = plan(model, "12GiB", example_inputs=(ids,), example_kwargs={"labels": ids})
    print(p)
    p.save("gpt2.json")
    model = rewrite(model, Plan.load("gpt2.json"))

Names are loaded when they are first used, so that importing this package costs nothing: torch is imported by whoever
plans or rewrites, and neither by `Plan.load` nor by the command line's `show`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from planner._version import __version__

if TYPE_CHECKING:
    from graph_capture.formats import format_bytes
    from planner.api import plan
    from planner.auto_checkpoint import auto_checkpoint
    from planner.blocks import BlockPlans, plan_blocks
    from planner.budget import Budget, parse_budget
    from planner.certificate.make import Certificate, certify, export_certificate
    from planner.certificate.verify import CertificateReport, verify_certificate
    from planner.decide import PlanChangedWarning
    from planner.errors import (
        BudgetError,
        CaptureError,
        CertificateError,
        FactoryError,
        InfeasibleBudgetError,
        InputsUnknownError,
        InvalidPlanError,
        LoopError,
        NoScheduleError,
        PinError,
        PlanFileError,
        PlanMismatchError,
        PlannerError,
        RewriteError,
        UnsupportedModelError,
        WatchError,
    )
    from planner.export.make import export_policy
    from planner.export.policy import SelectivePolicy
    from planner.inductor_peak import InductorPeakWarning
    from planner.loops import checkpoint_loop
    from planner.max_batch_size import BatchTrial, MaxBatchSize, max_batch_size
    from planner.measure import StepMeasurement, measure_step
    from planner.minimum_budget import minimum_budget
    from planner.pareto import Pareto, ParetoPoint, pareto
    from planner.plan_file import Plan
    from planner.rewrite import restore, rewrite
    from planner.watch_report import WatchedStep, WatchReport
    from planner.watching import watch

__all__ = [
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
]

_HOMES = {
    "BatchTrial": "planner.max_batch_size",
    "BlockPlans": "planner.blocks",
    "Budget": "planner.budget",
    "Certificate": "planner.certificate.make",
    "CertificateReport": "planner.certificate.verify",
    "MaxBatchSize": "planner.max_batch_size",
    "Pareto": "planner.pareto",
    "ParetoPoint": "planner.pareto",
    "Plan": "planner.plan_file",
    "InductorPeakWarning": "planner.inductor_peak",
    "PlanChangedWarning": "planner.decide",
    "SelectivePolicy": "planner.export.policy",
    "StepMeasurement": "planner.measure",
    "WatchReport": "planner.watch_report",
    "WatchedStep": "planner.watch_report",
    "auto_checkpoint": "planner.auto_checkpoint",
    "certify": "planner.certificate.make",
    "checkpoint_loop": "planner.loops",
    "export_certificate": "planner.certificate.make",
    "export_policy": "planner.export.make",
    "format_bytes": "graph_capture.formats",
    "max_batch_size": "planner.max_batch_size",
    "measure_step": "planner.measure",
    "minimum_budget": "planner.minimum_budget",
    "pareto": "planner.pareto",
    "parse_budget": "planner.budget",
    "plan": "planner.api",
    "plan_blocks": "planner.blocks",
    "restore": "planner.rewrite",
    "rewrite": "planner.rewrite",
    "verify_certificate": "planner.certificate.verify",
    "watch": "planner.watching",
}
"""The module of each public name; what is not listed is an error class."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "planner.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `planner.rewrite` the function: importing the module of that name would bind the module over it."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

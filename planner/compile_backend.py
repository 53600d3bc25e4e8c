"""``torch.compile(model, backend="checkpoint_planner", options={"budget": "12GiB"})``.

The backend makes a plan for the first training graph that `torch.compile` hands over (or takes the one in the options)
and runs it on the same road as :func:`planner.rewrite`. Compiled code that holds no gradient runs plainly.

One plan bounds the memory of one graph. A graph break cuts a step into graphs that are compiled one after the other,
each of which keeps its activations while the next ones run: when the first has to be planned nobody knows what the
others will need, so no share of the budget could be right. A function that breaks is therefore refused, with the place
of the break; what `fullgraph=True` accepts is planned. The guards are those of the user's `torch.compile`.

Importing this module makes the name known to torch; so does the entry point of an installed package.

Written for torch 2.11 to 2.13: relies on `compile_subgraph_reason`, and on `InstructionTranslator`, for the breaks.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import register_backend
from torch._dynamo.symbolic_convert import InstructionTranslator

from graph_capture.prepare import differentiable_outputs
from graph_capture.static_shapes import is_symbolic, static_graph
from planner.backend import PlannedBackend
from planner.compile_options import CompileOptions, read_options
from planner.compile_plan import CompileDecider
from planner.decide import PlanChangedWarning
from planner.errors import CaptureError, PlanMismatchError, PlannerError, RewriteError
from planner.inductor_compiler import check_compiler
from planner.inductor_peak import check_kernels, warn_if_over
from planner.ranks import data_parallel_ranks
from planner.world import environment_differences, shown

NAME = "checkpoint_planner"
GROUP = "torch_dynamo_backends"


# By what Dynamo calls for one `torch.compile`, so that its later graphs find the plan of the first.
_deciders: weakref.WeakKeyDictionary[Any, CompileDecider] = weakref.WeakKeyDictionary()


def checkpoint_planner(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph for `torch.compile`; see :class:`~planner.compile_options.CompileOptions` for `options`.

    What is wrong is raised when the compiled function is called, as the planner's own error: raised here, it would
    arrive wrapped in one of the compiler's, or be dropped in silence where torch is told to suppress errors.
    """
    try:
        read = read_options(options, mode)
        if not (torch.is_grad_enabled() and differentiable_outputs(module)):
            return module.forward
        _refuse_pieces(module)
        if not is_symbolic(module):
            return _planned(module, example_inputs, read)
        static = static_graph(module, example_inputs)
        run = _planned(static.module, static.example_inputs, read)
        return lambda *arguments: run(*(arguments[i] for i in static.kept))
    except PlanMismatchError as error:
        decider = _deciders.get(InstructionTranslator.current_tx().output.compiler_fn)
        others = environment_differences(decider.plan) if decider is not None and decider.plan is not None else []
        return _raiser(PlanMismatchError(f"{error} What differs besides: {shown(others)}.") if others else error)
    except (PlannerError, CaptureError) as error:
        return _raiser(error)


def _planned(module: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions) -> Callable[..., Any]:
    decider = _decider_of_this_compilation(options)
    select_loss, decide = decider.callbacks(module, example_inputs)
    given = decider.plan if options.plan is not None else None
    kernels = options.chosen_compiler if given is None else given.compiler
    compiler = options.compiler or kernels
    if given is not None:
        check_kernels(given, compiler)
    if compiler == "inductor":
        check_compiler(next((i.device.type for i in example_inputs if isinstance(i, torch.Tensor)), "cpu"))
    backend = PlannedBackend(select_loss, decide, compiler=compiler, kernels=kernels, expect=decider.expect)
    run = backend(module, example_inputs)
    if decider.plan is not None and decider.plan.compiler != compiler:
        warn_if_over(decider.plan)
    while decider.changes:
        warnings.warn(PlanChangedWarning(f"planned again: {decider.changes.pop()}"), stacklevel=3)
    return run


def _decider_of_this_compilation(options: CompileOptions) -> CompileDecider:
    compiler = InstructionTranslator.current_tx().output.compiler_fn
    known = _deciders.get(compiler)
    if known is None:
        known = _deciders[compiler] = CompileDecider(options, data_parallel_ranks(None))
    return known


def _refuse_pieces(module: fx.GraphModule) -> None:
    """Refuse a graph that is only a part of what torch.compile was given."""
    reason: Any = getattr(module, "compile_subgraph_reason", None)
    if reason is None or "DDPOptimizer" in str(reason.reason):
        raise RewriteError(
            "the graph was cut before it reached this backend. For DDP, whose optimizer cuts it at its buckets, set "
            "torch._dynamo.config.optimize_ddp = False: this backend hands over each gradient when it is made, which "
            "lets buckets leave as early as in eager"
        )
    if reason.graph_break:
        where = "; ".join(f"{f.filename}:{f.lineno} in {f.name}" for f in reason.user_stack[-1:]) or "an unknown line"
        raise RewriteError(
            f"the function breaks into several graphs at {where} ({_first_line(reason.reason)}). A plan bounds the "
            "memory of one graph, and the others are not known while it is made. Remove the break (fullgraph=True "
            "shows all of them), or plan the part of the model that has none: rewrite(part, plan)."
        )
    root: Any = InstructionTranslator.current_tx().output.root_tx
    code = root.f_code
    around = _frames_around(code)
    if around:
        raise RewriteError(
            f"torch.compile left {around[0].co_name} ({_place(around[0])}) to Python and compiled {code.co_name} "
            f"({_place(code)}) inside of it by itself, as one graph of several, each with memory that the others do "
            "not see, so that no plan can hold the budget. Remove what it cannot trace (fullgraph=True shows it), or "
            "plan the model alone: rewrite(model, plan)."
        )


def _frames_around(compiled: types.CodeType) -> list[types.CodeType]:
    """The frames between what was given to `torch.compile` and the code that is being compiled, torch's left out.

    The rest of a function after a break that made no graph is called by the function itself, which does not count.
    """
    frames: list[types.CodeType] = []
    frame: Any = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith("_dynamo/eval_frame.py") and code.co_name in ("compile_wrapper", "_fn"):
            break
        if code.co_filename.endswith("_dynamo/convert_frame.py"):
            frames.clear()  # so far it was the compiler, called in the place of the frame that it compiles
        elif not _is_library(code.co_filename):
            frames.append(code)
        frame = frame.f_back
    own = _function_name(compiled)
    return [c for c in frames if own == compiled.co_name or own != _function_name(c)]


def _function_name(code: types.CodeType) -> str:
    """The name of the function whose code, or whose rest after a graph break, this is."""
    resumed = re.match(r"torch_dynamo_resume_in_(.+)_at_\d+$", code.co_name)
    return resumed.group(1) if resumed else code.co_name


def _is_library(path: str) -> bool:
    """Whether a file is torch's or of Python's standard library."""
    standard = path.startswith(os.path.dirname(os.__file__)) and "site-packages" not in path
    return standard or path.startswith(os.path.dirname(torch.__file__))


def _place(code: types.CodeType) -> str:
    return f"{code.co_filename}:{code.co_firstlineno}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def _raiser(error: Exception) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        raise error.with_traceback(None)

    return run


def register() -> None:
    """Make the name known to `torch.compile`, unless the entry point of an installed package does so."""
    installed = importlib.metadata.entry_points(group=GROUP)
    if NAME not in installed.names:
        register_backend(checkpoint_planner, name=NAME)


register()

"""Everything that touches TorchDynamo's private parts, for planning and for running alike.

Written for torch 2.11 to 2.13. Dynamo is used for its guards: it checks before every call that what a captured graph
bakes in (shapes, numbers, flags, modules, parameters) is still true.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.variables.misc import RandomVariable
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config

from graph_capture.cuda_kernels import move_to_cuda, with_cuda_attention
from graph_capture.decompositions import decompositions_for
from graph_capture.devices import Device
from graph_capture.effects import checks_without_tokens
from graph_capture.errors import CaptureError
from graph_capture.graph import Compiler
from graph_capture.huggingface import as_in_eager
from graph_capture.joint import Joint, partitioner
from graph_capture.prepare import example_value, output_nodes, prepare
from graph_capture.recurrent import trained_recurrent_layers
from graph_capture.whole_operators import whole_operators

RECOMPILE_LIMIT = 256


@contextlib.contextmanager
def dynamo_settings() -> Iterator[None]:
    """The settings under which our graphs are traced; the process's own settings are left as they are.

    - `skip_nnmodule_hook_guards=False`: by default a hook that is added later would be ignored in silence.
    - `allow_rnn`: recurrent layers are traced instead of refused.
    - logging calls in a forward are skipped instead of breaking the graph.
    - `use_numpy_random_stream`: NumPy's random functions are refused instead of drawn from torch's generator. So are
      generators of Python's :mod:`random` of the user's own, whose numbers would be repeated at every call.
    - `optimize_ddp=False`: Dynamo's own bucket splitting would cut the graph; the token chain gives the overlap.
    """
    config = torch._dynamo.config
    names = ("ignore_logging_functions", "ignore_logger_methods")
    known = next(name for name in names if hasattr(config, name))
    settings = {
        "skip_nnmodule_hook_guards": False,
        "allow_rnn": True,
        "use_numpy_random_stream": True,
        "optimize_ddp": False,
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": RECOMPILE_LIMIT * 8,
        known: set(getattr(config, known)) | _logging_functions(),
    }
    with config.patch(settings), as_in_eager(), trained_recurrent_layers(), _no_random_objects():
        yield


@contextlib.contextmanager
def _no_random_objects() -> Iterator[None]:
    """Dynamo traces a `random.Random` without a guard on its state; as an unknown object it breaks the graph."""
    known = RandomVariable.is_supported_random_obj
    RandomVariable.is_supported_random_obj = staticmethod(lambda _: False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        RandomVariable.is_supported_random_obj = staticmethod(known)  # type: ignore[method-assign]


@contextlib.contextmanager
def aot_settings(compiler: Compiler) -> Iterator[None]:
    """The settings under which AOTAutograd traces for us, a graph for the kernels of `compiler`.

    - `donated_buffer=False`: buffers that the backward may overwrite would forbid `retain_graph=True`.
    - `backward_pass_autocast="off"`: a backward runs outside of autocast, as PyTorch recommends and as every trainer
      does; by default what autocast was at the forward would cast operators of the backward, too.
    - `fallback_random` (Inductor's, which fx reads): a random operator whose result nobody uses stays, because it
      advances the generator, and with it what every later random operator draws.
    - the checks of linear algebra take no token (:mod:`~graph_capture.effects`).
    - interpolation and some losses stay whole, as in eager (:mod:`~graph_capture.whole_operators`).
    """
    ours = {"donated_buffer": False, "backward_pass_autocast": "off"}
    with (
        functorch_config.patch(ours),
        inductor_config.patch(fallback_random=True),
        trained_recurrent_layers(),
        checks_without_tokens(),
        whole_operators(compiler),
    ):
        yield


def _logging_functions() -> set[Any]:
    functions: set[Any] = {warnings.warn}
    module = sys.modules.get("transformers.utils.logging")
    if module is not None:
        functions |= {getattr(module, n) for n in ("warning_once", "info_once", "warning_advice") if hasattr(module, n)}
    functions |= {getattr(logging.Logger, n) for n in ("debug", "info", "warning", "error", "warn")}
    return functions


@dataclass
class CapturedCall:
    """A call that Dynamo traced and that was not run: every operator's result is a placeholder.

    **Fields:**

    - `module`, `example_inputs`: the graph, as Dynamo hands it to a backend.
    - `result`: what the call returned, as a Python object, with an empty fake tensor for each output of the graph.
    - `outputs`: those fake tensors, in the order of the graph's outputs.
    - `real_inputs`: the tensors that the graph was called with, in the order of its placeholders.
    """

    module: fx.GraphModule
    example_inputs: tuple[Any, ...]
    context: TracingContext
    outputs: tuple[Any, ...]
    result: Any = None
    real_inputs: tuple[Any, ...] = ()
    grad_enabled: bool = True

    def joint(self, loss_outputs: Sequence[int], card: Device | None = None, compiler: Compiler = "eager") -> Joint:
        """Trace the joint forward-backward graph, for a loss that comes from the given outputs.

        With a `card` that is not here, the graph is the one that this card would run. For a `compiler`, what it fuses
        is taken apart (:mod:`~graph_capture.decompositions`).
        """
        found: list[Joint] = []

        def sink(joint: Joint) -> Any:
            found.append(joint)
            raise _Captured

        with tracing(self.context), aot_settings(compiler), _trace_errors():
            prepared = prepare(self.module, self.example_inputs, loss_outputs)
            if card is not None:
                with_cuda_attention(prepared.module, card)
            with contextlib.suppress(_Captured):
                aot_module_simplified(
                    prepared.module,
                    list(prepared.example_inputs),
                    fw_compiler=_never,
                    bw_compiler=_never,
                    decompositions=dict(decompositions_for(compiler)),
                    partition_fn=partitioner(sink),
                    keep_inference_input_mutations=True,
                )
        if not found:
            raise CaptureError("the graph has no backward: no output depends on an input that requires a gradient")
        if card is not None:
            move_to_cuda(found[0])
        return found[0]


@contextlib.contextmanager
def _trace_errors() -> Iterator[None]:
    """What autograd refuses while the backward is traced, it would refuse in eager, too."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CaptureError):
            raise
        raise CaptureError(
            f"the backward pass cannot be traced: {str(error).splitlines()[0]} If an in-place update overwrites what "
            "the backward needs, update a copy."
        ) from error
    except (AssertionError, NotImplementedError) as error:
        if not _raised_by_torch(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CaptureError(
            f"torch cannot trace forward and backward of this model as one graph: {reason} Where an input is written "
            "to and shares its memory with another one, pass copies (.clone()), or update a copy."
        ) from error


def _raised_by_torch(error: BaseException) -> bool:
    """Whether an error comes from torch's own code, not from ours."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__", "")).startswith("torch.")


class _Captured(Exception):
    """Ends a trace whose result is known."""


def _never(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    raise AssertionError("a captured graph is never compiled")


@dataclass
class _Recorder:
    """A Dynamo backend that keeps the graph and returns empty outputs."""

    calls: list[CapturedCall] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        context = TracingContext.get()
        call = CapturedCall(module, tuple(example_inputs), context, (), grad_enabled=torch.is_grad_enabled())
        self.calls.append(call)
        values = [example_value(node) for node in output_nodes(module)]

        def run(*arguments: Any) -> tuple[Any, ...]:
            call.real_inputs = arguments
            call.outputs = tuple(_empty_like(v) if isinstance(v, torch.Tensor) else v for v in values)
            return call.outputs

        return run


def _empty_like(value: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return empty.requires_grad_(value.requires_grad)


def traceable(function: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """A function of (args, kwargs) around `function` that Dynamo traces, whatever it is.

    Dynamo skips the frames of torch's own modules, so that a bare `nn.Linear` would not be captured. And it keeps its
    guarded programs on the code object: each function gets one of its own, so that models do not share a limit.
    """

    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)


def capture_call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> CapturedCall:
    """Trace one call with Dynamo, without running it; raises :class:`CaptureError` if it cannot be captured whole.

    To be called with fake tensors under their `FakeTensorMode`, on a copy of the module: what the call does beside its
    graph (attributes that it sets) is done.
    """
    recorder = _Recorder()
    compiled = torch.compile(traceable(function), backend=recorder, fullgraph=True, dynamic=False)
    try:
        with dynamo_settings():
            result = compiled(tuple(args), kwargs)
    except Exception as error:
        raise capture_error(error) from error
    if not recorder.calls:
        raise CaptureError("the call runs no tensor operator, so there is nothing to plan")
    call = recorder.calls[-1]
    call.result = result
    return call


def check_arguments(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise Python's own `TypeError` for missing and unknown arguments, which Dynamo words in its own way."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(f"{name}() {error}: check the arguments that the model is called with") from None
    except ValueError:  # a callable without a signature
        return


def capture_error(error: BaseException) -> CaptureError:
    """One clear message from what Dynamo raises: the reason, and the line of the user's code that stopped it."""
    if type(error).__name__ == "FailOnRecompileLimitHit":
        return CaptureError(
            f"the model was captured {RECOMPILE_LIMIT} times and changed once more: a number, a flag or a shape that "
            "its forward reads is another one at every call, as an attribute that it counts up. Keep such a number in "
            "a tensor (a buffer), or count outside of the forward; TORCH_LOGS=recompiles shows which one it is."
        )
    text = str(error)
    reason = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    for label in ("Explanation:", "Developer debug context:"):
        found = re.search(re.escape(label) + r"\s*(.+)", text)
        if found and label == "Explanation:":
            reason = f"{reason} {found.group(1).strip()}"
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', text)
    own = [f for f in frames if "/torch/" not in f[0] and f[0] != __file__] or frames
    where = f"{own[-1][0]}:{own[-1][1]} in {own[-1][2]}" if own else "an unknown line"
    return CaptureError(
        f"the model cannot be captured as one graph: {reason} It was stopped at {where}. A value that is read back "
        "from a tensor (.item(), an `if` on a tensor), printing, or an unknown library call breaks the graph: move it "
        "out of the forward, or plan the part of the model that has none."
    )

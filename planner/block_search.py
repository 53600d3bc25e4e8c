"""The search behind :func:`planner.plan_blocks`: how much every block may keep, so that the whole step fits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from graph_capture.capture import Capture, capture, resident_bytes, with_declared, workspace_model
from graph_capture.fake import fake_copy, fake_inputs, fake_mode_of
from graph_capture.formats import format_bytes
from graph_capture.graph import Compiler, Graph
from graph_capture.huggingface import as_in_eager
from graph_capture.inputs import resolve_inputs
from planner.api import plan_of
from planner.block_memory import BlockCall, BlockMemory, detached, record_calls, whole_peak_bytes
from planner.blocks import BlockPlans
from planner.budget import Budget, parse_budget
from planner.describe import describe_model
from planner.errors import NoScheduleError, UnsupportedModelError
from planner.measure import loss_of
from planner.pins import NO_PINS, Pins, check_matches, matching, pinned
from planner.plan_file import Plan
from planner.ranks import refuse_wrapper
from solvers.auto import Auto
from solvers.schedule import Schedule
from solvers.simulator import simulate_store_all
from solvers.solution import Solution, Solver

ROUNDS = 6
"""Bisections of the kept fraction: the last one decides over 1/64 of what the blocks would keep."""


@dataclass(frozen=True)
class _Kind:
    """Blocks with the same program: their capture, the block that it was made of, and their names."""

    captured: Capture
    block: nn.Module
    names: tuple[str, ...]
    pins: Pins = NO_PINS

    @property
    def store_all(self) -> BlockMemory:
        """What a block needs without recomputation."""
        free = self.captured.graph.without_released
        return BlockMemory.of(free, Schedule.store_all(free))

    def pinned(self, pins: Pins) -> _Kind:
        """The same blocks, with those of the pins that name a module inside of them."""
        mine = matching(self.captured.graph, pins)
        captured = dataclasses.replace(self.captured, graph=pinned(self.captured.graph, mine))
        return dataclasses.replace(self, captured=captured, pins=mine)


@dataclass(frozen=True)
class _Attempt:
    """One limit of the kept fraction: a solution for each kind of block, within the limit that its graph states.

    `kept_fraction` is what the blocks do keep; where modules are pinned that may be less than the limit allows.
    """

    fraction: float
    limited: tuple[tuple[Graph, int, Solution], ...]
    peak_bytes: int
    kept_fraction: float


def search(
    model: Any,
    budget: int | str | Budget,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None,
    *,
    names: Sequence[str] | None,
    loss_fn: Callable[[Any], torch.Tensor] | None,
    shards: int,
    param_dtype: torch.dtype | None,
    solver: Solver | None,
    device: str | None,
    compiler: Compiler,
    extra_bytes: dict[str, int],
    pins: Pins,
) -> BlockPlans:
    """See :func:`planner.blocks.plan_blocks`."""
    wanted, solver = parse_budget(budget), solver or Auto()
    module, args, kwargs = resolve_inputs(model, example_inputs, example_kwargs)
    refuse_wrapper(module)
    names = tuple(names) if names is not None else find_blocks(module)
    step = _Step.of(module, args, kwargs, names, loss_fn, param_dtype, device, compiler)
    check_matches([kind.captured.graph for kind in step.kinds], pins, whose=" inside of a block")
    kinds = [kind.pinned(pins) for kind in step.kinds]
    fixed = with_declared(_fixed_lines(module, args, kwargs, names, shards, param_dtype), extra_bytes)

    def peak_with(memories: Mapping[str, BlockMemory]) -> int:
        return sum(fixed.values()) + step.peak_bytes(memories, gradients_stay=shards == 1)

    store_all = peak_with({name: kind.store_all for kind in kinds for name in kind.names})
    budget_bytes = wanted.resolve(store_all)
    started = time.perf_counter()
    best = _bisect(kinds, solver, peak_with, budget_bytes)
    seconds = time.perf_counter() - started
    plans = [_plan(kind, module, limited, solver, seconds) for kind, limited in zip(kinds, best.limited, strict=True)]
    weights = [len(kind.names) * kind.captured.graph.step_seconds for kind in kinds]
    overhead = sum(w * plan.overhead for w, plan in zip(weights, plans, strict=True)) / sum(weights)
    return BlockPlans(
        plans=tuple(plans),
        plan_of_block={name: i for i, kind in enumerate(kinds) for name in kind.names},
        budget_bytes=budget_bytes,
        predicted_peak_bytes=best.peak_bytes,
        covers=(*fixed.items(), ("activations, gradients, temporaries", best.peak_bytes - sum(fixed.values()))),
        kept_fraction=best.kept_fraction,
        overhead=overhead,
    )


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """The modules of the outermost lists of at least two modules of one class."""
    found: list[str] = []
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        children = list(module.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        trained = all(any(True for _ in child.parameters()) for child in children)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and alike and trained and not inside:
            lists.append(name)
            found += [f"{name}.{child}" if name else child for child, _ in module.named_children()]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no nn.ModuleList of equal blocks: name them, as plan_blocks(model, budget, "
            "..., blocks=['encoder.0', 'encoder.1']), or plan the whole model with plan(...)."
        )
    return tuple(found)


@dataclass(frozen=True)
class _Step:
    """The fake twin of a model, the calls of its blocks, and their kinds."""

    twin: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss_fn: Callable[[Any], torch.Tensor] | None
    calls: dict[str, BlockCall]
    kinds: tuple[_Kind, ...]
    mode: Any

    @classmethod
    def of(
        cls,
        module: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        names: Sequence[str],
        loss_fn: Callable[[Any], torch.Tensor] | None,
        param_dtype: torch.dtype | None,
        device: str | None,
        compiler: Compiler,
    ) -> _Step:
        mode = fake_mode_of(module, (args, kwargs))
        twin = _cast(fake_copy(module, mode), param_dtype, mode)
        fake_args, fake_kwargs = _as_dtype(fake_inputs((tuple(args), dict(kwargs)), mode), param_dtype, mode)
        blocks = {name: twin.get_submodule(name) for name in names}
        with mode, as_in_eager(), torch.random.fork_rng(devices=[]):
            calls, _ = record_calls(twin, blocks, lambda: twin(*fake_args, **fake_kwargs))
        idle = [name for name in names if name not in calls]
        if idle:
            raise UnsupportedModelError(
                f"block {idle[0]!r} does not run exactly once per step, which a plan for it alone needs: leave it out "
                "of blocks=[...], or plan the whole model with plan(...)."
            )
        kinds: dict[str, _Kind] = {}
        for name, block in blocks.items():
            with mode:
                inputs = _as_dtype(detached((calls[name].args, calls[name].kwargs)), param_dtype, mode)
            options: dict[str, Any] = {"device": device, "compiler": compiler, "gradient_accumulation": False}
            captured = capture(block, inputs[0], inputs[1], **options)
            rows = describe_model(block).parameter_fingerprint
            key = f"{type(block).__qualname__} {rows} {captured.graph.fingerprint} {captured.program_fingerprint}"
            known = kinds.get(key)
            kinds[key] = (
                _Kind(captured, block, (name,))
                if known is None
                else dataclasses.replace(known, names=(*known.names, name))
            )
        return cls(twin, fake_args, fake_kwargs, loss_fn, calls, tuple(kinds.values()), mode)

    def peak_bytes(self, memories: Mapping[str, BlockMemory], gradients_stay: bool) -> int:
        """Peak of the step above what is resident, with these blocks."""
        stubs = {n: (self.twin.get_submodule(n), self.calls[n], m) for n, m in memories.items()}
        return whole_peak_bytes(
            self.twin,
            self.args,
            self.kwargs,
            stubs,
            lambda result: loss_of(result, self.loss_fn),
            mode=self.mode,
            workspace=workspace_model(self.kinds[0].captured.device),
            gradients_stay=gradients_stay,
        )


def _bisect(
    kinds: Sequence[_Kind], solver: Solver, peak_with: Callable[[Mapping[str, BlockMemory]], int], budget_bytes: int
) -> _Attempt:
    """The largest kept fraction that fits; raises :class:`~planner.errors.NoScheduleError` if none does."""
    smallest: int | None = None
    keepable = sum(len(kind.names) * kind.store_all.saved_bytes for kind in kinds)

    def attempt(fraction: float) -> _Attempt | None:
        limited = [_solve(kind, solver, fraction) for kind in kinds]
        memories: dict[str, BlockMemory] = {}
        for kind, (_, _, solution) in zip(kinds, limited, strict=True):
            if solution.schedule is None:
                return None
            memory = BlockMemory.of(kind.captured.graph, solution.schedule)
            memories |= dict.fromkeys(kind.names, memory)
        kept = sum(memory.saved_bytes for memory in memories.values())
        return _Attempt(fraction, tuple(limited), peak_with(memories), kept / keepable if keepable else 1.0)

    best, low, high = None, 0.0, 1.0
    for number in range(ROUNDS + 1):
        fraction = 1.0 if number == 0 else (low + high) / 2
        tried = attempt(fraction)
        if tried is None:  # less than the blocks must keep whatever they recompute
            low = fraction
            continue
        smallest = tried.peak_bytes if smallest is None else min(smallest, tried.peak_bytes)
        if tried.peak_bytes <= budget_bytes:
            best = tried if best is None or tried.fraction > best.fraction else best
            low = fraction
            if number == 0:
                break
        else:
            high = fraction
    if best is None:
        known = f" The smallest peak that was found is {format_bytes(smallest)}." if smallest is not None else ""
        if any(kind.pins for kind in kinds):
            known += " The modules pinned by keep= and recompute= count: without them less may do."
        raise NoScheduleError(
            f"no plan of the blocks keeps a step within {format_bytes(budget_bytes)}.{known} Raise the budget, shard "
            "over more ranks, or make the step smaller (batch size, sequence length, dtype).",
            smallest_known_budget_bytes=smallest,
        )
    return best


def _solve(kind: _Kind, solver: Solver, fraction: float) -> tuple[Graph, int, Solution]:
    """Solve for one block that keeps at most a fraction of what it would keep.

    The limit is put into the graph as workspace of the loss, which runs while nothing but the kept values is there;
    otherwise the block may use what it needs without recomputation. Where pins ask for more than that, it may use what
    running its forward again right after the turn needs.
    """
    graph = kind.captured.graph
    store_all = simulate_store_all(graph)
    position = next(i for i, o in enumerate(graph.operators) if o.phase == "loss")
    kept_bytes = store_all.timeline_bytes[position] - int((1.0 - fraction) * kind.store_all.saved_bytes)
    loss = graph.operators[position]

    def within(budget_bytes: int) -> tuple[Graph, int, Solution]:
        limit = dataclasses.replace(loss, workspace_bytes=loss.workspace_bytes + budget_bytes - kept_bytes)
        limited = dataclasses.replace(
            graph, operators=(*graph.operators[:position], limit, *graph.operators[position + 1 :])
        )
        return limited, budget_bytes, solver.solve(limited, budget_bytes)

    found = within(store_all.peak_bytes)
    if found[2].schedule is not None or not graph.released:
        return found
    # Beside what a first run has in memory: the gradients of the outputs, and what may be held over the turn.
    beside = [v for v, value in enumerate(graph.values) if v not in graph.released and value.producer <= position]
    return within(store_all.peak_bytes + sum(graph.values[v].size_bytes for v in beside))


def _plan(kind: _Kind, module: nn.Module, limited: tuple[Graph, int, Solution], solver: Solver, seconds: float) -> Plan:
    graph, budget_bytes, solution = limited
    share = (
        f"one of {len(kind.names)} equal blocks of {type(module).__name__}; the workspace of the loss stands for what "
        "the other blocks leave no room for"
    )
    captured = dataclasses.replace(
        kind.captured,
        graph=graph,
        eager_peak_bytes=simulate_store_all(kind.captured.graph).peak_bytes,
        eager_peak_source="the block's peak without recomputation",
        notes=(share, *kind.captured.notes),
    )
    original = module.get_submodule(kind.names[0])
    wanted = parse_budget(budget_bytes)
    return plan_of(original, captured, wanted, budget_bytes, solution, solver, seconds, pins=kind.pins)


def _fixed_lines(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    shards: int,
    param_dtype: torch.dtype | None,
) -> dict[str, int]:
    """What no plan changes: parameters, gradients, buffers, inputs, and FSDP's own memory, by a bound."""
    lines = resident_bytes(module, args, kwargs)
    gradients = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    if shards == 1:
        return lines
    # Each parameter is padded to a multiple of the shards in its first dimension.
    padded = sum(-(-p.shape[0] // shards) * p[0].numel() * p.element_size() if p.dim() else p.element_size()
                 for p in module.parameters())  # fmt: skip
    wide = [sum(_width(p, param_dtype) for p in module.get_submodule(n).parameters()) for n in names]
    inside = {id(p) for n in names for p in module.get_submodule(n).parameters()}
    root = sum(_width(p, param_dtype) for p in module.parameters() if id(p) not in inside)
    largest = max([*wide, root])
    return lines | {
        "parameters": padded,
        "gradients, sharded": -(-gradients * padded // max(1, lines["parameters"])),
        "FSDP: gathered parameters": root + 3 * largest,
        "FSDP: gradients being reduced": 2 * largest,
    }


def _width(parameter: torch.Tensor, dtype: torch.dtype | None) -> int:
    return parameter.numel() * (dtype or parameter.dtype).itemsize


def _cast(module: nn.Module, dtype: torch.dtype | None, mode: Any) -> nn.Module:
    """Parameters in the dtype that FSDP's mixed precision gives them while they are gathered."""
    if dtype is None:
        return module
    known: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            if id(parameter) not in known:
                with mode, torch.no_grad():
                    cast = parameter.to(dtype)
                known[id(parameter)] = nn.Parameter(cast, requires_grad=parameter.requires_grad)
            owner._parameters[name] = known[id(parameter)]
    return module


def _as_dtype(inputs: Any, dtype: torch.dtype | None, mode: Any) -> Any:
    """Floating inputs as FSDP casts them; integers stay."""
    if dtype is None:
        return inputs

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        with mode:
            return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, cast, inputs)

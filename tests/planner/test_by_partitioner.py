"""PyTorch's memory budget as points beside the curve: what its partitioner cuts is what the schedule recomputes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition

from graph_capture.build import Binding
from graph_capture.capture import bare_graph
from graph_capture.graph import Graph
from graph_capture.partitions import saved_by_pytorch
from graph_capture.prepare import differentiable_outputs
from planner import pareto
from planner.by_partitioner import RATIOS, by_partitioner, just_in_time
from solvers.schedule import Schedule
from solvers.simulator import simulate
from solvers.solution import overhead_of
from tests.graph_capture.captured import captured
from tests.models import MODELS
from tests.solvers.random_graphs import training_chain


def joint_graph(name: str) -> tuple[Graph, Binding]:
    case = MODELS[name]()
    call = captured(case.model, *case.args, **case.kwargs)
    losses = [i for i in differentiable_outputs(call.module) if call.outputs[i].dim() == 0]
    return bare_graph(call.joint(losses or (0,)))


def backward_names(binding: Binding, ratio: float) -> set[str]:
    """The nodes of the backward graph that PyTorch's partitioner makes."""
    module = binding.joint.module
    twin = fx.GraphModule(module, copy.deepcopy(module.graph))
    with functorch_config.patch(activation_memory_budget=ratio):
        _, backward = min_cut_rematerialization_partition(
            twin, None, num_fwd_outputs=len(binding.joint.forward_outputs)
        )
    return {node.name for node in backward.graph.nodes if node.op == "call_function"}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(("name", "ratio"), [("gpt2_sdpa", 0.1), ("unet", 0.1), ("unet", 0.5)])
def test_the_schedule_recomputes_what_pytorch_recomputes(name: str, ratio: float) -> None:
    graph, binding = joint_graph(name)
    before = [str(node) for node in binding.joint.module.graph.nodes]
    saved = saved_by_pytorch(graph, binding, [ratio])[ratio]
    schedule = by_partitioner(graph, saved)
    assert [str(node) for node in binding.joint.module.graph.nodes] == before
    again = [operator for operator, count in Counter(schedule.order).items() if count > 1]
    theirs = backward_names(binding, ratio)
    operators = graph.operators
    forward = {i: n.name for i, n in enumerate(binding.nodes) if n and operators[i].phase == "forward"}
    theirs &= {name for i, name in forward.items() if operators[i].recomputable}  # what is returned stays with us
    # PyTorch merges equal operators before it cuts, such as those that count positions.
    unmerged = {node.name for node in fx_graph_cse(binding.joint.module.graph).nodes}
    assert {forward[operator] for operator in again} & unmerged == theirs
    assert again
    assert simulate(graph, schedule).peak_bytes > 0  # it is legal


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_more_is_recomputed_for_less_memory_budget() -> None:
    graph, binding = joint_graph("unet")
    found = saved_by_pytorch(graph, binding, RATIOS)
    recomputed = [len(by_partitioner(graph, found[ratio]).order) for ratio in RATIOS]
    assert recomputed == sorted(recomputed, reverse=True)


def test_everything_kept_is_store_all_and_nothing_kept_recomputes_each_operator_once() -> None:
    graph = training_chain(6)
    assert just_in_time(graph, range(len(graph.values))) == Schedule.store_all(graph)
    schedule = just_in_time(graph, ())
    assert set(Counter(schedule.order).values()) <= {1, 2}
    assert overhead_of(graph, schedule)[0] > 0


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_curve_has_the_budgets_that_were_asked_for_beside_it() -> None:
    case = MODELS["unet"]()
    found = pareto(case.model, ["100%"], case.args, case.kwargs, loss_fn=case.loss_fn, memory_budgets=[0.25])
    (point,) = found.beside
    assert (point.label, point.kind) == ("memory budget 0.25", "by hand")
    assert point.peak_bytes < found.store_all_peak_bytes
    assert point.overhead > 0
    assert pareto(found.graph, ["100%"]).beside == ()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_masks_of_dropout_are_saved() -> None:
    """Taken apart for Inductor, dropout draws its mask from nothing; PyTorch would not draw it twice."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 1), nn.Flatten(0))
    joint = captured(model, torch.randn(1, 6)).joint((0,), compiler="inductor")
    graph, binding = bare_graph(joint, "inductor")
    order = by_partitioner(graph, saved_by_pytorch(graph, binding, [0.1])[0.1]).order
    (mask,) = [i for i, operator in enumerate(graph.operators) if operator.random_state_bytes]
    assert order.count(mask) == 1

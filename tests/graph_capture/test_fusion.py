"""What Inductor computes in passing is no operator and no value; what that saves is in the prices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph_capture.build import Binding, build_graph
from graph_capture.capture import capture
from graph_capture.costs import Roofline
from graph_capture.devices import DEVICES
from graph_capture.errors import CaptureError
from graph_capture.graph import Graph, Operator
from graph_capture.workspace import NoWorkspace
from tests.graph_capture.captured import captured, joint_of

CPU = DEVICES["cpu"]
FLOAT = 4


def fused(model: nn.Module, *args: torch.Tensor) -> tuple[Graph, Binding]:
    """Graph and binding of a model whose loss is its output 0, as Inductor runs it."""
    return build_graph(joint_of(model, *args), Roofline(CPU), NoWorkspace(), compiler="inductor")


def taken_apart(model: nn.Module, *args: torch.Tensor) -> tuple[Graph, Binding]:
    """The same, traced with the operators that Inductor takes apart."""
    joint = captured(model, *args).joint((0,), compiler="inductor")
    return build_graph(joint, Roofline(CPU), NoWorkspace(), compiler="inductor")


def forward_of(graph: Graph) -> list[str]:
    return [o.target.removeprefix("aten.").split(".")[0] for o in graph.operators if o.phase == "forward"]


def the(graph: Graph, name: str, phase: str = "forward") -> Operator:
    (operator,) = [o for o in graph.operators if o.target.startswith(f"aten.{name}.") and o.phase == phase]
    return operator


class Chain(nn.Module):
    """A matrix product, three pointwise operators of which nothing is saved, a view among them, and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.into(x) + 1.0
        return self.out((y.view(2, 3, 6) * 2.0).view(6, 6).sigmoid()).sum()


def test_a_chain_of_pointwise_operators_is_one_operator() -> None:
    graph, binding = fused(Chain(), torch.randn(6, 6))
    assert forward_of(graph) == ["addmm", "sigmoid", "addmm", "sum"]
    assert the(graph, "sigmoid").inputs == graph.operators[0].outputs
    forward, backward = ({str(n.target) for n in binding.inlined if ("backward" in str(n.target)) == b} for b in (0, 1))
    assert forward == {"aten.add.Tensor", "aten.view.default", "aten.mul.Tensor"}
    assert backward == {"aten.sigmoid_backward.default"}  # in the product with 2, which two operators read


def test_a_kernel_costs_its_traffic() -> None:
    """It reads what lies in memory, and writes what another kernel reads; the launch is the writer's."""
    graph, _ = fused(Chain(), torch.randn(6, 6))
    matrix = 36 * FLOAT
    assert the(graph, "sigmoid").seconds == pytest.approx(2 * matrix / CPU.bytes_per_second + CPU.launch_seconds)
    gradient = the(graph, "mul", "backward")  # and the gradient of the sigmoid, which reads two matrices
    assert gradient.seconds == pytest.approx(3 * matrix / CPU.bytes_per_second + CPU.launch_seconds)
    assert the(graph, "sum").seconds == pytest.approx((matrix + FLOAT) / CPU.bytes_per_second + CPU.launch_seconds)


class TwoReaders(nn.Module):
    """What a pointwise operator makes is read twice, and by no generated kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sin(self.one(x))
        return (self.other(y) * y).sum()


def test_what_is_read_twice_or_by_another_kernel_lies_in_memory() -> None:
    graph, _ = fused(TwoReaders(), torch.randn(6, 6))
    assert forward_of(graph) == ["addmm", "sin", "addmm", "sum"]
    sine = the(graph, "sin")
    assert sine.seconds == pytest.approx(2 * 36 * FLOAT / CPU.bytes_per_second + CPU.launch_seconds)


class Far(nn.Module):
    """A sum of two is read by an operator that runs long after it."""

    def __init__(self, operands: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(4))
        self.operands = operands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.maps[0](x), self.maps[1](x)
        early = a + b if self.operands == 2 else a + 1.0
        late = self.maps[3](torch.relu(self.maps[2](torch.relu(b))))
        return (early * late.detach()).sum()


@pytest.mark.parametrize(("operands", "inlined"), [(2, False), (1, True)])
def test_far_from_its_reader_a_node_is_inlined_only_if_it_reads_no_more_than_it_makes(
    operands: int, inlined: bool
) -> None:
    graph, _ = fused(Far(operands), torch.randn(6, 6))
    assert ("add" not in forward_of(graph)) == inlined


def test_memory_is_written_over_where_one_program_makes_and_reads_it() -> None:
    """A sum may take the place of a matrix product that nobody else reads; not that of what is read later."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.one(x)
            return self.other(self.other(first) + first).sum()

    graph, _ = fused(Residual(), torch.randn(6, 6))
    add = next(o for o in graph.operators if o.target == "aten.add.Tensor" and o.phase == "forward")
    assert [len(graph.uses[v]) for v, _ in add.in_place] == [1]


def test_a_captured_step_knows_its_kernels() -> None:
    eager, inductor = (
        capture(Chain(), (torch.randn(6, 6),), gradient_accumulation=False, compiler=compiler)
        for compiler in ("eager", "inductor")
    )
    assert eager.program_fingerprint != inductor.program_fingerprint
    assert len(inductor.graph) < len(eager.graph)
    assert inductor.graph.step_seconds < eager.graph.step_seconds
    assert inductor.eager_peak_bytes == eager.eager_peak_bytes
    with pytest.raises(CaptureError, match="'eager' or 'inductor'"):
        capture(Chain(), (torch.randn(6, 6),), compiler="xla")  # type: ignore[arg-type]


class Scaled(nn.Module):
    """Layer scale: in the backward, the gradient's product with the scale is read by operators of a later slice."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.rand(1, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.nn.functional.gelu(self.into(x)) * self.gamma).square().mean()


def test_a_parameter_is_read_before_its_gradient_is_handed_over() -> None:
    """A hook may change it then, as an optimizer in the backward does."""
    joint = joint_of(Scaled(), torch.randn(6, 6))
    graph, binding = build_graph(joint, Roofline(CPU), NoWorkspace(), compiler="inductor")
    (gamma,) = (p for p in joint.primals if p.meta["val"].shape == (1, 6))
    ends = binding.delivery.slice_ends
    handed_over = ends[binding.delivery.slice_of[joint.primals.index(gamma)]]
    readers = [
        i
        for i, node in enumerate(binding.nodes)
        if node is not None and gamma in read_in_passing(node, binding) and graph.operators[i].phase == "backward"
    ]
    assert readers
    assert max(readers) <= handed_over


def read_in_passing(node: torch.fx.Node, binding: Binding) -> set[torch.fx.Node]:
    """What an operator reads, itself or in passing."""
    found: set[torch.fx.Node] = set()
    for argument in node.all_input_nodes:
        found |= read_in_passing(argument, binding) if argument in binding.inlined else {argument}
    return found


class Pieces(nn.Module):
    """What is computed in passing is taken apart, and each piece is read by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = (self.map(x) * 2.0).chunk(2, -1)
        return (torch.tanh(one) * other).sum()


def test_pieces_of_what_is_computed_in_passing_are_so_too() -> None:
    graph, binding = fused(Pieces(), torch.randn(6, 6))
    assert forward_of(graph)[0] == "addmm"
    assert "mul" not in forward_of(graph)[1:2]
    assert {"aten.split.Tensor"} <= {str(n.target) for n in binding.inlined}


class Positions(nn.Module):
    """A position's embedding, which has no batch, is added to a token's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 6), nn.Embedding(8, 6)
        self.map = nn.Linear(6, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(8))
        return (h + self.map(nn.functional.layer_norm(h, (6,)))).square().mean()


def test_what_is_inlined_does_not_depend_on_the_batch() -> None:
    shapes = [fused(Positions(), torch.zeros(b, 8, dtype=torch.long))[0].structure_fingerprint for b in (1, 4, 20)]
    assert len(set(shapes)) == 1


class Complex(nn.Module):
    """Inductor calls all operators on complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_complex(self.map(x).view(6, 3, 2)) * 1j * 0.5
        return torch.view_as_real(turned).sum()


def test_what_inductor_calls_lies_in_memory() -> None:
    graph, _ = fused(Complex(), torch.randn(6, 6))
    assert forward_of(graph) == ["addmm", "mul", "mul", "sum"]


class Gates(nn.Module):
    """A sigmoid is read at once, and again behind a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.one(x))
        return (self.other(x + gate.mean(0)) * gate).sum()


def test_what_is_dear_is_not_computed_again_behind_a_called_operator() -> None:
    graph, _ = fused(Gates(), torch.randn(6, 6))
    assert "sigmoid" in forward_of(graph)


class Pools(nn.Module):
    """A convolution, normalised, and pooled: the pooling reads the ReLU from memory, the backward pass need not."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.max_pool2d(self.norm(self.into(x)).relu(), 2)).sum()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_max_pooling_leaves_offsets(layout: torch.memory_format) -> None:
    """One byte each, where indices have eight; of its input the backward pass reads the shape."""
    model = Pools().to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 8, 8).to(memory_format=layout)
    graph, binding = taken_apart(model, x)
    (pool,) = [o for o in graph.operators if "max_pool_with_offsets" in o.target]
    (relu,) = pool.inputs
    assert [graph.values[v].size_bytes for v in pool.outputs] == [2 * 4 * 4 * 4 * FLOAT, 2 * 4 * 4 * 4]
    assert graph.uses[relu] == (graph.values[pool.outputs[0]].producer,)
    backward = the(graph, "max_pool2d_with_indices_backward", "backward")
    assert pool.outputs[1] in backward.inputs
    assert not any("offsets_to_indices" in o.target or "full" in o.target for o in graph.operators)
    (node,) = [n for n in binding.nodes if n is not None and "max_pool2d_with_indices_backward" in str(n.target)]
    assert node.args[1].meta["val"].is_contiguous(memory_format=layout)  # type: ignore[union-attr]
    again, _ = build_graph(binding.joint, Roofline(CPU), NoWorkspace(), compiler="inductor")
    assert again.fingerprint == graph.fingerprint


class Sum(nn.Module):
    """The sum of a model's result, as a loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).sum()


def test_dropout_leaves_a_mask() -> None:
    """Its result is a product, which may run again without drawing; nothing that is read in passing lies in memory."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6))
    graph, _ = taken_apart(Sum(model), torch.randn(6, 6))
    (mask,) = [o for o in graph.operators if o.random_state_bytes]
    assert not mask.inputs
    assert graph.values[mask.outputs[0]].size_bytes == 36
    product = the(graph, "mul")
    assert mask.outputs[0] in product.inputs
    assert product.recomputable
    assert product.flops == product.random_state_bytes == 0

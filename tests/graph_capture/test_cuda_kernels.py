"""The graph of a card that is not here: its kernels, what they save, and the bytes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.capture import Capture, capture
from graph_capture.costs import cost_model
from graph_capture.devices import DEVICES
from graph_capture.errors import CaptureError
from graph_capture.graph import Graph
from graph_capture.measured import Measured
from graph_capture.target import absent_card, target_of
from planner import plan, rewrite
from planner.errors import PlanMismatchError
from solvers.schedule import Schedule
from solvers.simulator import simulate

Output = tuple[tuple[int, ...], str, int]


def on_fake_tensors(make: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            return make().train()
        finally:
            torch.set_default_dtype(default)


def tokens(model: nn.Module) -> dict[str, torch.Tensor]:
    mode = next(model.parameters()).fake_mode  # type: ignore[attr-defined]
    with mode:
        ids = torch.zeros(2, 128, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


def outputs(graph: Graph, target: str) -> list[list[Output]]:
    """Shape, dtype and bytes of what each operator of that name makes."""
    return [
        [(graph.values[v].shape, graph.values[v].dtype, graph.values[v].size_bytes) for v in o.outputs]
        for o in graph.operators
        if o.target == f"aten.{target}.default"
    ]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 128, "n_head": 2, "n_positions": 128, "vocab_size": 512}
    return GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, attn_pdrop=0.1))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))


def captured(make: Any, device: str, **inputs: torch.Tensor) -> Capture:
    model = on_fake_tensors(make)
    return capture(model, (), tokens(model) | inputs, device=device)


def test_gpt2_saves_what_flash_attention_and_the_cuda_kernels_save() -> None:
    found = captured(gpt2, "h100-80gb")
    graph = found.graph
    assert outputs(graph, "_scaled_dot_product_flash_attention") == [
        [
            ((2, 2, 128, 64), "bfloat16", 65536),
            ((2, 2, 128), "float32", 2048),
            ((2,), "uint64", 512),
            ((), "uint64", 512),
            ((0,), "bfloat16", 0),
        ]
    ]
    hidden = ((2, 128, 128), "bfloat16", 65536)
    statistics = ((2, 128, 1), "float32", 1024)
    assert outputs(graph, "native_layer_norm") == [[hidden, statistics, statistics]] * 3
    assert outputs(graph, "native_dropout") == [[hidden, ((2, 128, 128), "bool", 32768)]] * 3
    assert {o.random_state_bytes for o in graph.operators} == {0, 16}
    assert all(value.size_bytes % 512 == 0 for value in graph.values)
    attention = next(o for o in graph.operators if o.target.endswith("flash_attention.default"))
    assert attention.flops == 2 * 2 * 2 * 2 * 128 * 128 * 64
    assert attention.workspace_bytes == 32 * 2**20
    assert any("1 x _scaled_dot_product_flash_attention" in note for note in found.notes)


def test_the_backward_reads_what_the_attention_kernel_saved() -> None:
    graph = captured(gpt2, "a100-80gb").graph
    forward = next(o for o in graph.operators if o.target.endswith("flash_attention.default"))
    backward = next(o for o in graph.operators if o.target.endswith("flash_attention_backward.default"))
    saved = [graph.values[v].shape for v in forward.outputs if v in backward.inputs]
    assert saved == [(2, 2, 128, 64), (2, 2, 128), (2,), ()]


@pytest.mark.parametrize(("device", "kernel"), [("h100-80gb", "cudnn"), ("a100-80gb", "flash"), ("v100-32gb", "math")])
def test_llamas_grouped_heads(device: str, kernel: str) -> None:
    graph = captured(llama, device).graph
    names = {o.target for o in graph.operators if "scaled_dot_product" in o.target}
    if kernel == "math":
        assert not names
        assert any("softmax" in o.target for o in graph.operators)
        return
    assert names == {
        f"aten._scaled_dot_product_{kernel}_attention.default",
        f"aten._scaled_dot_product_{kernel}_attention_backward.default",
    }
    ((out, log_sum_exp, *_),) = outputs(graph, f"_scaled_dot_product_{kernel}_attention")
    assert out == ((2, 4, 128, 32), "bfloat16", 65536)
    assert log_sum_exp[1:] == ("float32", 4096)
    (gradients,) = outputs(graph, f"_scaled_dot_product_{kernel}_attention_backward")
    assert [g[0] for g in gradients] == [(2, 4, 128, 32), (2, 2, 128, 32), (2, 2, 128, 32)]


class Biased(nn.Module):
    """Attention with a trained bias of its scores, as T5 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.bias = nn.Linear(64, 192), nn.Parameter(torch.zeros(1, 4, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).view(2, 32, 3, 4, 16).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=self.bias)
        return out.float().square().sum()


def test_a_trained_bias_takes_the_efficient_kernel_and_gets_its_gradient() -> None:
    model = on_fake_tensors(Biased)
    with next(model.parameters()).fake_mode:  # type: ignore[attr-defined]
        x = torch.empty(2, 32, 64, dtype=torch.bfloat16)
    graph = capture(model, (x,), device="h100-80gb").graph
    ((out, log_sum_exp, *_),) = outputs(graph, "_scaled_dot_product_efficient_attention")
    assert (out, log_sum_exp) == (((2, 4, 32, 16), "bfloat16", 8192), ((2, 4, 32), "float32", 1024))
    assert (1, 4, 32, 32) in [value.shape for value in graph.values if value.kind == "gradient"]


def small_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)
    )


def test_a_convolutional_net_keeps_the_statistics_of_its_batch_norm() -> None:
    model, x = small_resnet(), torch.randn(2, 3, 16, 16)
    graph = capture(model, (x,), loss_fn=lambda y: y.sum(), device="h100-80gb").graph
    norm = next(o for o in graph.operators if "batch_norm" in o.target and o.phase == "forward")
    made = [(graph.values[v].shape, graph.values[v].dtype, graph.values[v].size_bytes) for v in norm.outputs]
    assert made[:3] == [((2, 8, 16, 16), "float32", 16384), ((8,), "float32", 512), ((8,), "float32", 512)]
    assert all(value.size_bytes % 512 == 0 for value in graph.values)


def test_eager_is_counted_with_the_cards_kernels_and_block_size() -> None:
    found = captured(gpt2, "a100-80gb")
    assert found.eager_peak_bytes is not None
    store_all = simulate(found.graph, Schedule.store_all(found.graph)).peak_bytes
    assert found.eager_peak_bytes % 64 == 0  # 512-byte blocks, and the bookkeeping
    assert 1.0 <= found.eager_peak_bytes / store_all < 1.01


def test_cuda_without_a_card_says_which_names_there_are() -> None:
    with pytest.raises(CaptureError, match=r"device='cuda' is the card at hand, and there is none here: .*h100-80gb"):
        plan(nn.Linear(4, 4), "1GiB", (torch.randn(2, 4),), device="cuda")


class Card:
    """What torch says of a card."""

    name, total_memory = "NVIDIA H100 80GB HBM3", 80 * 2**30


def test_cuda_is_the_card_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    device = target_of(nn.Linear(4, 4), "cuda")
    assert device is DEVICES["h100-80gb"]
    assert absent_card(nn.Linear(4, 4), device) is device
    model = cost_model("measured", device)
    assert isinstance(model, Measured)
    assert model.device_type == "cuda"


def test_operators_are_measured_on_the_card_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def seconds(target: Any, args: Any, kwargs: Any, device_type: str, threads: int) -> float:
        timed.append(device_type)
        return 1e-3

    monkeypatch.setattr("graph_capture.capture.target_of", lambda *_: DEVICES["h100-80gb"])
    monkeypatch.setattr("graph_capture.costs._device_type_here", lambda _: "cuda")
    monkeypatch.setattr("graph_capture.measured._timed", seconds)
    made = plan(nn.Linear(4, 4), "1GiB", (torch.randn(2, 4),), device="cuda")
    assert (made.settings["device"], made.settings["costs"]) == ("h100-80gb", "measured")
    assert set(timed) == {"cuda"}


def test_a_plan_for_a_card_is_refused_on_the_cpu_with_the_first_difference() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x).view(2, 32, 4, 16).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(y, y, y).sum()

    model, x = Attends(), torch.randn(2, 32, 64)
    made = plan(model, "1GiB", (x,), device="a100-80gb")
    rewrite(model, made, on_change="error")
    with pytest.raises(PlanMismatchError, match=r"for a100-80gb and the model is on the CPU.*efficient_attention"):
        model(x)

"""The attention kernel that a card would run, condition by condition, and the call of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graph_capture.cuda_attention import attention_of, choose_attention
from graph_capture.devices import DEVICES

H100, A100, V100, ADA = (DEVICES[n] for n in ("h100-80gb", "a100-80gb", "v100-32gb", "rtx4090-24gb"))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def inputs(
    dtype: torch.dtype = BF16, size: int = 64, heads: tuple[int, int] = (4, 4), lengths: tuple[int, int] = (32, 32)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.empty(2, heads[0], lengths[0], size, dtype=dtype, device="meta", requires_grad=True)
    key, value = (torch.empty(2, heads[1], lengths[1], size, dtype=dtype, device="meta") for _ in range(2))
    return query, key, value


MASK = torch.empty(2, 1, 32, 32, dtype=BF16, device="meta")


@pytest.mark.parametrize(
    ("device", "tensors", "options", "kernel"),
    [
        (H100, inputs(), {}, "cudnn"),
        (H100, inputs(), {"mask": MASK}, "cudnn"),
        (H100, inputs(), {"mask": MASK.bool()}, "cudnn"),
        (H100, inputs(), {"mask": MASK.detach().requires_grad_()}, "efficient"),
        (H100, inputs(), {"dropout_p": 0.125}, "cudnn"),
        (H100, inputs(), {"dropout_p": 0.1}, "flash"),
        (H100, inputs(size=160), {}, "flash"),
        (H100, inputs(size=60), {}, "flash"),
        (H100, inputs(size=60), {"mask": MASK}, "math"),
        (H100, inputs(size=320), {}, "efficient"),
        (H100, inputs(dtype=F32), {}, "efficient"),
        (H100, inputs(dtype=torch.float64), {}, "math"),
        (H100, inputs(heads=(4, 2)), {"enable_gqa": True}, "cudnn"),
        (A100, inputs(), {}, "flash"),
        (A100, inputs(), {"mask": MASK}, "efficient"),
        (A100, inputs(heads=(4, 2)), {"enable_gqa": True}, "flash"),
        (A100, inputs(heads=(4, 2)), {"enable_gqa": True, "mask": MASK}, "math"),
        (A100, inputs(heads=(4, 2)), {}, "math"),
        (A100, inputs(lengths=(32, 48)), {"is_causal": True}, "efficient"),
        (V100, inputs(dtype=F16), {}, "efficient"),
        (V100, inputs(dtype=BF16), {}, "math"),
        (V100, inputs(dtype=F32, size=63), {}, "efficient"),
        (ADA, inputs(size=256), {}, "flash"),
        (ADA, inputs(size=256), {"dropout_p": 0.1}, "efficient"),
        (ADA, inputs(size=200), {}, "efficient"),
    ],
)
def test_the_kernel_is_the_one_that_torch_would_choose(
    device: Any, tensors: Any, options: dict[str, Any], kernel: str
) -> None:
    assert choose_attention(device, *tensors, **options) == kernel


def test_switches_and_the_environment_are_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        assert choose_attention(H100, *inputs()) == "efficient"
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert choose_attention(H100, *inputs()) == "flash"


@pytest.mark.parametrize("device", [H100, A100, V100])
@pytest.mark.parametrize("size", [64, 60])
@pytest.mark.parametrize("masked", [False, True])
def test_every_kernel_gives_the_shape_of_the_plain_call_and_its_gradients(device: Any, size: int, masked: bool) -> None:
    tensors = inputs(size=size)
    out = attention_of(device)(*tensors, attn_mask=MASK if masked else None)
    assert (out.shape, out.dtype) == (tensors[0].shape, BF16)
    (gradient,) = torch.autograd.grad(out.sum(), tensors[0])
    assert gradient.shape == tensors[0].shape

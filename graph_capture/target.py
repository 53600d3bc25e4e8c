"""The device that a step is planned for: the one that the model is on, the card at hand, or one that is not here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from graph_capture.devices import DEVICES, Device, device_by_name, device_of_card
from graph_capture.errors import CaptureError
from graph_capture.graph import Graph


def target_of(module: nn.Module, device: str | Device | None) -> Device:
    """The device to plan for; `"cuda"` is the card at hand. Raises :class:`CaptureError` if there is none."""
    if device is None:
        return device_of(module)
    if device != "cuda":
        return device_by_name(device)
    if not torch.cuda.is_available():
        raise CaptureError(
            "device='cuda' is the card at hand, and there is none here: plan for one by its name, "
            f"{', '.join(name for name, d in DEVICES.items() if d.memory_bytes)}"
        )
    return _card_at_hand(torch.cuda.current_device())


def absent_card(module: nn.Module, target: Device) -> Device | None:
    """The card to plan for if the module is not on it: its kernels are put in the place of the CPU's."""
    on_cpu = all(p.device.type == "cpu" for p in module.parameters())
    return target if target.memory_bytes and on_cpu else None


def device_of(module: nn.Module) -> Device:
    """The device that the parameters are on."""
    where = next(module.parameters()).device
    if where.type != "cuda" or not torch.cuda.is_available():
        return DEVICES["cpu"]
    return _card_at_hand(where)


def _card_at_hand(where: Any) -> Device:
    card = torch.cuda.get_device_properties(where)
    try:
        return device_of_card(card.name, card.total_memory)
    except ValueError as error:
        raise CaptureError(str(error)) from error


def card_notes(graph: Graph, card: Device) -> tuple[str, ...]:
    """What was assumed of a card that is not here."""
    found = Counter(o.target for o in graph.operators if o.phase == "forward" and "attention" in o.target)
    kernels = ", ".join(f"{count} x {target.removeprefix('aten.')}" for target, count in found.items())
    chosen = f"; attention as torch would choose there, with cuDNN newer than 9.15.0: {kernels}" if kernels else ""
    return (
        f"captured on the CPU for {card.name}{chosen}. Not counted: what the allocator leaves unsplit of blocks above "
        "1 MiB (at most 1 MiB each), fragmentation, and CUDA's context; declare them with extra_bytes",
    )

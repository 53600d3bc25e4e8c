"""What one execution of an operator costs in seconds and FLOPs.

Cost models sit behind one small interface, :class:`CostModel`. `Roofline` prices an operator at the larger of its
arithmetic and its memory traffic on a named device (Williams, Waterman and Patterson, "Roofline", CACM 2009), plus the
time of a launch. A CPU draws random numbers more slowly than it writes them, so that dropout has a third term there.
`FlopCount` is the classic count, for comparison with papers that know nothing else. What the device at hand really
takes is measured by :class:`graph_capture.measured.Measured`.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from graph_capture.devices import Device, device_of_card
from graph_capture.flops import flops_of
from graph_capture.joint import is_random, tensors_of

PricedBy = Literal["flops", "bytes"]
Costs = Literal["roofline", "measured", "flops"]
"""The cost models by name, as `plan(..., costs=...)` takes them."""


@dataclass(frozen=True)
class Price:
    """Cost of one execution; `priced_by` says whether a FLOP formula was known."""

    seconds: float
    flops: int
    priced_by: PricedBy


class CostModel(abc.ABC):
    """Prices one operator of a joint graph."""

    @abc.abstractmethod
    def price(self, node: fx.Node) -> Price:
        """Seconds and FLOPs of one execution of `node`, whose inputs and outputs are fake tensors."""

    @abc.abstractmethod
    def price_of_kernel(self, moved_bytes: int, launches: int) -> Price:
        """Seconds of a part of a generated kernel that reads and writes so many bytes, and adds so many launches."""

    @property
    def estimated(self) -> frozenset[str]:
        """The operators whose seconds were to be measured, and could not be."""
        return frozenset()


@dataclass(frozen=True)
class Roofline(CostModel):
    """max(FLOPs / peak FLOP/s, bytes moved / bandwidth, random numbers / generator's rate) + launch time."""

    device: Device

    def price(self, node: fx.Node) -> Price:
        """An operator without a FLOP formula is priced by its bytes alone, never as free."""
        flops = flops_of(node)
        seconds = bytes_moved(node) / self.device.bytes_per_second
        if flops:
            seconds = max(seconds, flops / self.device.peak_flops(_dtype(node)))
        rate = self.device.random_numbers_per_second
        if rate and is_random(node):
            seconds = max(seconds, _random_numbers(node) / rate)
        return Price(seconds + self.device.launch_seconds, flops or 0, "bytes" if flops is None else "flops")

    def price_of_kernel(self, moved_bytes: int, launches: int) -> Price:
        """The traffic, and the launches."""
        return Price(moved_bytes / self.device.bytes_per_second + launches * self.device.launch_seconds, 0, "bytes")


@dataclass(frozen=True)
class FlopCount(CostModel):
    """One second per FLOP of a formula, and per byte moved where there is none."""

    def price(self, node: fx.Node) -> Price:
        """FLOPs as seconds; bytes moved for operators without a formula."""
        flops = flops_of(node)
        return Price(
            float(flops if flops is not None else bytes_moved(node)), flops or 0, "bytes" if flops is None else "flops"
        )

    def price_of_kernel(self, moved_bytes: int, launches: int) -> Price:
        """The bytes moved."""
        return Price(float(moved_bytes), 0, "bytes")


def default_costs(device: str | Device | None) -> Costs:
    """Where seconds come from if nobody says it: measured on the card at hand, else a roofline."""
    return "measured" if device == "cuda" else "roofline"


def cost_model(costs: Costs, device: Device) -> CostModel:
    """The cost model of that name for a device; raises `ValueError` if there is none, or the device is not here."""
    if costs == "roofline":
        return Roofline(device)
    if costs == "flops":
        return FlopCount()
    if costs != "measured":
        raise ValueError(f"costs is {costs!r}; it must be 'roofline', 'measured' or 'flops'")
    from graph_capture.measured import Measured

    return Measured(device, _device_type_here(device))


def _device_type_here(device: Device) -> str:
    """`"cpu"` or `"cuda"`, if it is that device which is at hand."""
    if not device.memory_bytes:
        return "cpu"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        if device_of_card(card.name, card.total_memory) == device:
            return "cuda"
    raise ValueError(
        f"costs='measured' needs the device itself, and {device.name} is not here: take costs='roofline', or plan there"
    )


def bytes_moved(node: fx.Node) -> int:
    """Bytes that an operator reads and writes: each input and output tensor once."""
    tensors = [t for n in (*node.all_input_nodes, node) for t in tensors_of(n)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _random_numbers(node: fx.Node) -> int:
    """How many numbers a random operator draws: one for each element of its first result."""
    return tensors_of(node)[0].numel()


def _dtype(node: fx.Node) -> str:
    tensors = tensors_of(node)
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"

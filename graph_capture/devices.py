"""Devices by name: what the roofline needs to know of them, with the source of every number.

Figures are the manufacturers' data-sheet peaks (dense, without sparsity). ``cpu`` is a nominal two-core machine: only
the ratio of its two numbers matters for a plan. Launch time is what one small kernel costs at the least.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Device:
    """What the roofline needs to know of a device.

    **Fields:**

    - `flops_per_second`: peak for matrix products, by dtype name; `"default"` for what is not listed.
    - `bytes_per_second`: memory bandwidth. `launch_seconds`: least time of one operator.
    - `allocation_bytes`: the allocator hands out multiples of this.
    - `library_workspace_bytes`: scratch memory that matrix libraries keep once per process (cuBLAS).
    - `memory_bytes`: of the card; 0 if it is not a card. `compute_capability`: of the card; the choice of attention
      kernels depends on it. `source`: where the numbers come from.
    - `random_numbers_per_second`: how fast the generator is; 0 if it is never slower than the memory, as on cards.
    """

    name: str
    flops_per_second: Mapping[str, float] = field(hash=False)
    bytes_per_second: float
    launch_seconds: float
    allocation_bytes: int = 1
    library_workspace_bytes: int = 0
    memory_bytes: int = 0
    source: str = ""
    compute_capability: tuple[int, int] = (0, 0)
    random_numbers_per_second: float = 0.0

    def peak_flops(self, dtype: str) -> float:
        """Peak FLOP/s for matrix products of `dtype` (`"bfloat16"`, `"float32"`, ...)."""
        return self.flops_per_second.get(dtype, self.flops_per_second["default"])


def _gpu(
    name: str,
    half: float,
    tf32: float,
    single: float,
    bandwidth: float,
    gib: int,
    source: str,
    capability: tuple[int, int],
    workspace: int = 8,
) -> Device:
    rates = {
        "bfloat16": half,
        "float16": half,
        "float32": single,
        "tf32": tf32,
        "float64": single / 2,
        "default": single,
    }
    return Device(name, rates, bandwidth, 4e-6, 512, workspace * 2**20, gib * 2**30, source, capability)


DEVICES: Mapping[str, Device] = {
    d.name: d
    for d in (
        Device(
            "cpu",
            {"bfloat16": 100e9, "float16": 50e9, "float32": 100e9, "float64": 50e9, "default": 50e9},
            20e9,
            2e-6,
            source="nominal: two cores with 256-bit vector units",
            random_numbers_per_second=250e6,
        ),
        _gpu("v100-32gb", 125e12, 15.7e12, 15.7e12, 900e9, 32, "NVIDIA Tesla V100 data sheet (2020)", (7, 0)),
        _gpu("t4-16gb", 65e12, 8.1e12, 8.1e12, 320e9, 16, "NVIDIA T4 data sheet (2019)", (7, 5)),
        _gpu("a100-40gb", 312e12, 156e12, 19.5e12, 1555e9, 40, "NVIDIA A100 data sheet (2021)", (8, 0)),
        _gpu("a100-80gb", 312e12, 156e12, 19.5e12, 2039e9, 80, "NVIDIA A100 data sheet (2021)", (8, 0)),
        _gpu("l4-24gb", 121e12, 60e12, 30.3e12, 300e9, 24, "NVIDIA L4 data sheet (2023)", (8, 9)),
        _gpu("rtx3090-24gb", 71e12, 35.6e12, 35.6e12, 936e9, 24, "NVIDIA GA102 white paper (2021)", (8, 6)),
        _gpu("rtx4090-24gb", 165.2e12, 82.6e12, 82.6e12, 1008e9, 24, "NVIDIA Ada white paper (2022)", (8, 9)),
        _gpu("h100-80gb", 989e12, 494e12, 67e12, 3350e9, 80, "NVIDIA H100 SXM data sheet (2023)", (9, 0), 32),
        _gpu("h200-141gb", 989e12, 494e12, 67e12, 4800e9, 141, "NVIDIA H200 data sheet (2024)", (9, 0), 32),
    )
}


def device_by_name(name: str | Device) -> Device:
    """Look a device up; raises `ValueError` with the known names if there is none of that name."""
    if isinstance(name, Device):
        return name
    key = name.lower()
    if key not in DEVICES:
        close = difflib.get_close_matches(key, DEVICES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown device {name!r}.{hint} Known devices: {', '.join(DEVICES)}")
    return DEVICES[key]


def calibrated(name: str, flops_per_second: float, bytes_per_second: float, launch_seconds: float) -> Device:
    """A device with measured numbers in the place of data-sheet ones; its generator is as fast as its memory."""
    base = DEVICES["cpu"]
    return dataclasses.replace(
        base,
        name=name,
        flops_per_second={"default": flops_per_second},
        bytes_per_second=bytes_per_second,
        launch_seconds=launch_seconds,
        random_numbers_per_second=0.0,
        source="calibrated",
    )


def device_of_card(card: str, memory_bytes: int) -> Device:
    """The device of a card by the name that its driver gives it; of several sizes, the nearest.

    Raises `ValueError` with the known names if there is none.
    """
    words = card.lower().replace("geforce ", "").replace("rtx ", "rtx").replace("tesla ", "")
    found = [d for d in DEVICES.values() if d.memory_bytes and d.name.split("-")[0] in words]
    if not found:
        raise ValueError(f"the card {card!r} is not in the table; say device=... with one of {', '.join(DEVICES)}")
    return min(found, key=lambda d: abs(d.memory_bytes - memory_bytes))

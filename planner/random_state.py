"""Run a random operator again with the numbers of its first run.

The generator's state is saved right before the first run. A replay puts the present state aside, runs the operator
from the saved one, and puts the present one back, so that the generator ends as if nothing had been recomputed.
"""

from __future__ import annotations

from typing import Any

import torch


def save_random_state(device_type: str) -> torch.Tensor:
    """State of the default generator of a device: 5056 bytes on the CPU, 16 on CUDA (both as a CPU tensor)."""
    return torch.get_rng_state() if device_type == "cpu" else getattr(torch, device_type).get_rng_state()


def replay(state: torch.Tensor, device_type: str, operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `operator` with the generator state of its first run."""
    module = torch if device_type == "cpu" else getattr(torch, device_type)
    present = module.get_rng_state()
    module.set_rng_state(state)
    try:
        return operator(*args, **kwargs)
    finally:
        module.set_rng_state(present)

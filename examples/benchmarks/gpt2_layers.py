"""Seconds, overhead, bound and gap for GPT-2 of 12 and 48 layers, on fake tensors: no memory and no GPU is needed.

    python examples/benchmarks/gpt2_layers.py [--layers 12 48] [--budgets 0.9 0.8 ... 0.3] [--time-limit 30]

1024 wide, 16 heads, sequence 1024, batch 8, bf16, vocabulary 50257, scaled-dot-product attention. Budgets are
fractions of the store-all peak, once with everything counted (parameters, inputs, gradients) and, with
``--activations``, without what is resident. The roofline is 150 TFLOP/s and 1.5 TB/s with 4 microseconds a launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import platform
import resource
import time

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.capture import capture
from graph_capture.devices import calibrated
from solvers.auto import Auto
from solvers.schedule import Schedule
from solvers.simulator import simulate

DEVICE = calibrated("roofline 150 TFLOP/s, 1.5 TB/s", 150e12, 1.5e12, 4e-6)


def gpt2(layers: int, mode: FakeTensorMode) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A GPT-2 on fake tensors and its inputs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=1024, n_head=16, attn_pdrop=0.0, use_cache=False)
    default = torch.get_default_dtype()
    with mode:
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = GPT2LMHeadModel(config).train()
        finally:
            torch.set_default_dtype(default)
        ids = torch.zeros(8, 1024, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def main() -> None:
    """Print one table per depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--time-limit", type=float, default=30.0)
    parser.add_argument("--activations", action="store_true", help="fractions of the peak above what is resident")
    parser.add_argument("--save", help="write the captured graph as JSON to this path (one depth only)")
    options = parser.parse_args()
    print(f"{datetime.date.today()}  torch {torch.__version__}  Python {platform.python_version()}  {DEVICE.name}")
    for layers in options.layers:
        model, kwargs = gpt2(layers, FakeTensorMode())
        started = time.perf_counter()
        captured = capture(model, (), kwargs, device=DEVICE, gradient_accumulation=False)
        graph = captured.graph
        seconds = time.perf_counter() - started
        if options.activations:
            graph = dataclasses.replace(graph, resident_bytes={})
        if options.save:
            import json

            with open(options.save, "w", encoding="utf-8") as file:
                json.dump(graph.to_dict(), file)
        store_all = simulate(graph, Schedule.store_all(graph))
        print(
            f"\nGPT-2, {layers} layers: {len(graph)} operators, captured in {seconds:.1f} s; store-all peak "
            f"{store_all.peak_bytes / 2**30:.2f} GiB, eager {captured.eager_peak_bytes / 2**30:.2f} GiB, "
            f"step {graph.step_seconds:.3f} s"
        )
        print("budget  overhead %  bound %   gap %  seconds  status")
        for fraction in options.budgets:
            solution = Auto(time_limit_seconds=options.time_limit).solve(graph, int(fraction * store_all.peak_bytes))
            if solution.schedule is None:
                print(f"{fraction:6.2f}  {'-':>10}  {'-':>7}  {'-':>6}  {solution.seconds:7.1f}  {solution.message}")
                continue
            print(
                f"{fraction:6.2f}  {100 * solution.overhead:10.3f}  {100 * solution.lower_bound:7.3f}  "
                f"{100 * solution.gap:6.3f}  {solution.seconds:7.1f}  {solution.status.name}"
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"\npeak resident memory of this process and its largest child: {peak / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()

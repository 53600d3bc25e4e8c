"""How much a plan depends on the seconds that it was made with.

    python examples/benchmarks/cost_model.py graph.json ... --budgets 0.8,0.6,0.5 --seeds 5
    python examples/benchmarks/cost_model.py --models gpt2,resnet

*Perturbed*: every operator's seconds are multiplied by a random factor within ±20 %, a schedule is chosen on those, and
judged on the true ones, against the bound for the true ones. *Measured*: a model is captured with the roofline of a
nominal CPU, and with each distinct operator timed on the CPU at hand; schedules chosen on either are judged on the
measured seconds, against the bound for those. Overhead and bound in percent of the store-all step of the judge.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from graph_capture.graph import Graph, Operator, Value
from solvers import Auto, Schedule, Solution, simulate
from solvers.solution import overhead_of

sys.path.insert(0, str(Path(__file__).parent))
from snapshot_refinement import load


def perturbed(graph: Graph, share: float, seed: int) -> Graph:
    """The same graph with every operator's seconds off by up to `share`, as a seed draws it."""
    rng = random.Random(seed)
    operators = tuple(
        dataclasses.replace(o, seconds=o.seconds * rng.uniform(1 - share, 1 + share)) for o in graph.operators
    )
    return dataclasses.replace(graph, operators=operators)


@dataclass(frozen=True)
class Judged:
    """Schedules chosen on wrong seconds, on the true ones: overheads as fractions, and what right seconds give."""

    right: Solution
    overheads: tuple[float, ...]
    failures: int

    def __str__(self) -> str:
        if self.right.schedule is None or not self.overheads:
            return f"no schedule: {self.right.status.name}"
        mean, worst = statistics.mean(self.overheads), max(self.overheads)
        figures = (self.right.overhead, mean, worst, self.right.lower_bound, worst - self.right.lower_bound)
        return " ".join(f"{100 * figure:8.3f}" for figure in figures) + f"  {self.failures}"


def judge(true: Graph, wrong: Sequence[Graph], budget_bytes: int, solver: Auto) -> Judged:
    """Choose on each of the wrong graphs, judge on the true one."""
    right = solver.solve(true, budget_bytes)
    overheads: list[float] = []
    for graph in wrong:
        solution = solver.solve(graph, budget_bytes)
        if solution.schedule is not None:
            overheads.append(overhead_of(true, solution.schedule)[0])
    return Judged(right, tuple(overheads), len(wrong) - len(overheads))


def captured(name: str) -> tuple[Graph, Graph]:
    """A model of a size that this CPU trains, with the seconds of the roofline and with measured ones."""
    from graph_capture.capture import capture

    torch.manual_seed(0)
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=256, n_head=8, n_positions=256, vocab_size=4096))
        model.config.loss_type = "ForCausalLM"
        ids = torch.zeros(4, 256, dtype=torch.long)
        kwargs = {"input_ids": ids, "labels": ids}
    elif name == "resnet":
        from transformers import ResNetConfig, ResNetForImageClassification

        model = ResNetForImageClassification(ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]))
        kwargs = {"pixel_values": torch.zeros(8, 3, 96, 96), "labels": torch.zeros(8, dtype=torch.long)}
    else:
        raise SystemExit(f"there is no model {name!r}; there are gpt2 and resnet")
    made = [capture(model.train(), (), kwargs, costs=costs) for costs in ("roofline", "measured")]  # type: ignore[arg-type]
    return made[0].graph, made[1].graph


def warm_up() -> None:
    """Have everything compiled before time limits count."""
    from solvers.snapshot.anneal import Annealer, Cooling

    operators = tuple(Operator(f"o{i}", "o", "forward", (), (i,), 1.0) for i in range(4))
    graph = Graph(operators, tuple(Value(1, i) for i in range(4)))
    annealer = Annealer(graph)
    annealer.evaluate(range(4))
    annealer.polish(annealer.anneal(range(4), 9, seed=0, cooling=Cooling(), seconds=0.1).last, 9)


def rows(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the table."""
    solver = Auto(time_limit_seconds=options.time_limit)
    warm_up()
    for path in options.graphs:
        graph = load(path)
        peak_bytes = simulate(graph, Schedule.store_all(graph)).peak_bytes
        wrong = [perturbed(graph, options.share, seed) for seed in range(options.seeds)]
        for fraction in map(float, options.budgets.split(",")):
            judged = judge(graph, wrong, int(fraction * peak_bytes), solver)
            yield f"{graph.name[:26]:26} {len(graph):5} {f'±{options.share:.0%}':>9} {fraction:6.2f} {judged}"
    for name in filter(None, options.models.split(",")):
        roofline, measured = captured(name)
        peak_bytes = simulate(measured, Schedule.store_all(measured)).peak_bytes
        for fraction in map(float, options.budgets.split(",")):
            judged = judge(measured, [roofline], int(fraction * peak_bytes), solver)
            yield f"{name[:26]:26} {len(measured):5} {'roofline':>9} {fraction:6.2f} {judged}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graphs", nargs="*", type=Path)
    parser.add_argument("--models", default="", help="gpt2, resnet: captured here, and measured on this CPU")
    parser.add_argument("--budgets", default="0.8,0.6,0.5")
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--time-limit", type=float, default=10.0)
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    print(f"# {platform.machine()}, {platform.system()}, torch {torch.__version__}, {threads} threads; {options}")
    print("# right: chosen on the seconds that judge; mean and worst: chosen on wrong seconds; gap: of the worst")
    columns = " ".join(f"{column:>8}" for column in ("right %", "mean %", "worst %", "bound %", "gap %"))
    print(f"{'graph':26} {'ops':>5} {'wrong by':>9} {'budget':>6} {columns}  failures")
    for row in rows(options):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Side by side on this CPU, in one run, taken in turn: eager, checkpointing by hand, PyTorch's memory budget, and ours.

    python examples/benchmarks/side_by_side.py [--kernels eager inductor] [--models gpt2 llama vit resnet50 unet]
        [--channels-last] [--repeats 15] [--plans FOLDER] [--markdown examples/benchmarks/results/side_by_side.md]

The rivals: `torch.utils.checkpoint` around every block and around every second one (eager kernels alone), and
`activation_memory_budget` of torch._functorch at 0.1, 0.25, 0.5 and 0.75. Each is measured (allocator's events, all
bytes), then a plan is made within the very bytes that it peaked at, run, and measured. With the kernels of Inductor the
partitioner's ways and ours are compiled by it. Peaks are of a step that starts without ``.grad``. Columns: measured
peak; FLOPs and seconds of the cost model that are recomputed, in percent of the step's; with eager kernels, what the
recomputed operators take on this CPU, each measured alone, in percent of all operators; step time as a ratio to
eager's, the median of pairs, both sides of each pair taken in the same round. A loss is a rival that recomputes less
(seconds or FLOPs), peaks lower or is faster; losses are listed below the table, with what explains them.

Inductor by itself moves convolutions to channels-last; a planned model keeps the layouts that it has. With
``--channels-last`` the model and its images have that layout from the start, whoever compiles them.

With ``--plans`` plans by the roofline and by FLOPs are read from a folder, or written there, so that a second run, on a
quiet machine, need not solve again (they are of this version of the planner: empty the folder after a change);
Inductor's own cache on disk does the same for compilation.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import step_ratio
import suite
import torch
from torch import nn
from ways import RATIOS, Counter, Partitions, Work, checkpointed, partitioned, with_inductor

from graph_capture.costs import Costs
from graph_capture.graph import Graph
from planner import Plan, measure_step, plan, rewrite
from planner.errors import NoScheduleError
from planner.measure import loss_of

MIB = 2**20
CLOSED = 2e-3
"""Plans this near to their lower bound, as a fraction of the step, are kept; others may only have lacked time."""
NOTHING = Work()
READING = """\
Percentages are of eager's step; those in the column "measured" are of all operators' seconds, each measured alone.

How losses are explained:

- *FLOPs*: a plan minimises the seconds of the cost model, and may give a few matrix products or convolutions for much
  memory traffic. Where it does, a plan that prices FLOPs alone (`costs="flops"`) stands beside it.
- *Seconds*: a plan is as good as its solver's time limit; the row says how near to the lower bound it is.
- *Step time*: the rounds in which ours took longer are counted. Between 4 and 11 of 15 it may be chance (two-sided sign
  test, 5 %). Then two causes are told apart. One is the price of the traced program before anything is recomputed: the
  rows "everything kept" and "memory budget 1". Ours hands gradients over as they are made, group by group, which takes
  Python time: a U-Net of 32 groups took 1.5 to 1.8 ms beyond PyTorch's way with eager kernels, which counts in steps of
  a few ten milliseconds. The other is what the recomputed operators really take. The roofline's CPU is a
  nominal one; on the machine of this page one thread took 5 times its price for batch normalisation, 9 to 12 times for
  max pooling, and a third to a fifth for additions. A plan by measured prices (`costs="measured"`) knows that.
- *Inductor*: PyTorch's backward is one program, ours several, one for each large gradient or group of small ones, so
  that gradients are handed over as they are made. Inductor fuses inside of a program alone, and each has a price of its
  own per call. Alone it also moves convolutions to channels-last, which a planned model does not. Seconds are those of
  the memory traffic that fusion leaves; what is recomputed inside of the kernel that reads it costs nothing.
"""
PRICED: dict[Costs, str] = {"roofline": "", "flops": " (FLOPs alone)", "measured": " (measured prices)"}


def unet() -> step_ratio.Case:
    """Three levels, 16 wide, 64 x 64 pixels, batch 4."""
    images, target = torch.randn(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.long)
    return suite.UNet(16, 3), (images, target), {}


def tiny() -> step_ratio.Case:
    """A GPT-2 of two layers, to try this script."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = torch.randint(0, 512, (2, 64))
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=64, vocab_size=512, use_cache=False)
    return GPT2LMHeadModel(config), (), {"input_ids": ids, "labels": ids}


MODELS: dict[str, Callable[[], step_ratio.Case]] = {**step_ratio.MODELS, "unet": unet, "tiny": tiny}


def in_channels_last(case: step_ratio.Case) -> step_ratio.Case:
    """The same model and images, channels last in memory."""
    model, args, kwargs = case
    images = tuple(a.to(memory_format=torch.channels_last) if a.dim() == 4 else a for a in args)
    return model.to(memory_format=torch.channels_last), images, kwargs


@dataclass
class Row:
    """One way of running the step. `against`: the rival whose peak is the budget, for ours."""

    label: str
    model: nn.Module | None = None
    peak_bytes: int = 0
    recomputed: Work = NOTHING
    note: str = ""
    against: str = ""
    ratio: float = float("nan")
    seconds: list[float] = field(default_factory=list)


class Bench:
    """All ways of one model."""

    def __init__(self, case: step_ratio.Case, inductor: bool, time_limit: float, plans: Path | None = None) -> None:
        self.plain, self.args, self.kwargs = case
        self.plain.train()
        self.inductor, self.time_limit, self.plans = inductor, time_limit, plans
        self.step_work = NOTHING
        self.priced: Graph | None = None
        self.measured_prices: tuple[float, ...] = ()
        self.partitions: list[tuple[Partitions, int]] = []

    def step(self, model: nn.Module) -> float:
        """Seconds of one step from no `.grad`."""
        model.zero_grad()
        began = time.perf_counter()
        loss_of(model(*self.args, **self.kwargs)).backward()
        return time.perf_counter() - began

    def count(self, model: nn.Module) -> Work:
        """The work of one step of an eager model."""
        model.zero_grad()
        with Counter() as counter:
            loss_of(model(*self.args, **self.kwargs)).backward()
        return counter.total

    def measured(self, row: Row) -> Row:
        """Fill in the peak of one step."""
        assert row.model is not None
        row.peak_bytes = measure_step(row.model, *self.args, **self.kwargs).peak_bytes
        return row

    def rivals(self) -> list[Row]:
        """Eager first, then everything else that PyTorch offers."""
        eager = Row("eager", copy.deepcopy(self.plain))
        self.step_work = self.count(eager.model)  # type: ignore[arg-type]
        rows = [eager]
        for every, label in ((1, "checkpoint on every block"), (2, "checkpoint on every 2nd block")):
            model = checkpointed(copy.deepcopy(self.plain), every)
            rows.append(Row(label, model, recomputed=self.count(model) - self.step_work))
        ways: tuple[tuple[str, Any], ...] = (("aot_eager", partitioned),)
        if self.inductor:
            ways = (("inductor", with_inductor),)
            rows = rows[:1]
        for name, compile_ in ways:
            for ratio in (*RATIOS, 1.0):
                model = copy.deepcopy(self.plain)
                found = compile_(model, ratio, self.step)
                self.partitions.append((found, found.calls))
                rows.append(Row(f"memory budget {ratio:g} ({name})", model, recomputed=found.recomputed))
        rows = [self.measured(row) for row in rows]
        self.refuse_compiled_again()
        return rows

    def refuse_compiled_again(self) -> None:
        """What is compiled once more, later, gets whatever memory budget is set then."""
        if any(found.calls != calls for found, calls in self.partitions):
            raise RuntimeError("a way was compiled again, with another memory budget: its model changes at a call")

    def ours_against(self, rival: Row) -> list[Row]:
        """Ours at the rival's peak; by FLOPs alone as well, where it recomputes more of them; by measured seconds."""
        rows = [self.ours(rival, "roofline")]
        if rows[0].model is None:
            return rows
        if rows[0].recomputed.flops > rival.recomputed.flops:
            rows.append(self.ours(rival, "flops"))
        dear = rival.label.startswith("memory budget") and not rival.label.startswith("memory budget 1 ")
        return [*rows, self.ours(rival, "measured")] if dear and not self.inductor else rows

    def kept(self) -> Row:
        """Ours without any recomputation; with eager kernels its operators are measured, too."""
        row = self.ours(Row("", peak_bytes=2**50), "roofline")
        if self.inductor:  # eager's operators were counted one by one, not as Inductor fuses them
            assert self.priced is not None
            self.step_work = Work(self.step_work.flops, self.priced.step_seconds)
        else:
            by_measure = self.plan(copy.deepcopy(self.plain), 2**50, "measured").to_graph()
            self.measured_prices = tuple(o.seconds for o in by_measure.operators)
            self.step_work = replace(self.step_work, measured_seconds=sum(self.measured_prices))
        return replace(row, label="ours, everything kept", against="")

    def plan(self, model: nn.Module, budget_bytes: int, costs: Costs) -> Plan:
        """A plan within a budget, from the folder of plans if it is there."""
        compiler = "inductor" if self.inductor else "eager"
        fingerprint = f"{type(model).__name__}-{budget_bytes}-{costs}-{compiler}"
        path = self.plans / f"{fingerprint}.json" if self.plans and costs != "measured" else None
        if path and path.exists():
            return Plan.load(path)
        limits: dict[str, Any] = {"gradient_accumulation": False, "time_limit_seconds": self.time_limit}
        made = plan(model, budget_bytes, self.args, self.kwargs, costs=costs, compiler=compiler, **limits)
        if path and made.gap <= CLOSED:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.save(path)
        return made

    def ours(self, rival: Row, costs: Costs) -> Row:
        """A plan within the bytes that the rival peaked at. Its work is that of the roofline, whatever it prices by."""
        model = copy.deepcopy(self.plain)
        label = f"ours{PRICED[costs]} at the peak of: {rival.label}"
        try:
            made = self.plan(model, rival.peak_bytes, costs)
        except NoScheduleError as error:
            return Row(label, note=str(error).splitlines()[0], against=rival.label)
        if self.priced is None:
            self.priced = made.to_graph()  # the first plan of a model is priced by the roofline
        again = list(made.to_schedule().order)
        for operator in range(len(self.priced)):
            again.remove(operator)  # once each is the step itself
        operators = [self.priced.operators[i] for i in again]
        measured = sum(self.measured_prices[i] for i in again) if self.measured_prices else 0.0
        work = Work(sum(o.flops for o in operators), sum(o.seconds for o in operators), measured)
        rewrite(model, made)
        note = f"overhead {100 * made.overhead:.2f} %, lower bound {100 * made.lower_bound:.2f} %"
        return self.measured(Row(label, model, recomputed=work, note=note, against=rival.label))

    def time_in_turn(self, rows: list[Row], repeats: int) -> None:
        """Every round runs each way once; a ratio pairs a way with the eager step of the same round."""
        running = [row for row in rows if row.model is not None]
        seconds: list[list[float]] = []
        for repeat in range(repeats + 2):
            taken = [self.step(row.model) for row in running]  # type: ignore[arg-type]
            if repeat >= 2:
                seconds.append(taken)
        self.refuse_compiled_again()
        for column, row in enumerate(running):
            row.seconds = [taken[column] for taken in seconds]
            row.ratio = statistics.median(taken[column] / taken[0] for taken in seconds)


def slower(mine: Row, theirs: Row, by_label: dict[str, Row]) -> str:
    """What is known of a step time that is longer than a rival's: chance, fixed price, or the operators' real price."""
    rounds = sum(m > t for m, t in zip(mine.seconds, theirs.seconds, strict=True))
    said = f"; longer in {rounds} of {len(mine.seconds)} rounds"
    kept = by_label.get("ours, everything kept")
    untouched = next((row for label, row in by_label.items() if label.startswith("memory budget 1 ")), None)
    if kept is not None and untouched is not None:
        said += f"; before anything is recomputed {kept.ratio:.3f} against {untouched.ratio:.3f}"
    ours, their = mine.recomputed.measured_seconds, theirs.recomputed.measured_seconds
    if their:  # blocks checkpointed by hand are not measured operator by operator
        said += f"; recomputed operators measured alone {1e3 * ours:.2f} ms against {1e3 * their:.2f} ms"
    measured = by_label.get(mine.label.replace("ours at", f"ours{PRICED['measured']} at"))
    return said if measured is None else f"{said}; the plan by measured prices {measured.ratio:.3f}"


def losses(rows: list[Row]) -> list[str]:
    """What a rival does better than ours at its peak, in words."""
    found = []
    by_label = {row.label: row for row in rows}
    for row in rows:
        if not row.label.startswith("ours at"):
            continue
        rival = by_label[row.against]
        if row.model is None:
            found.append(f"{row.label}: no plan: {row.note}")
            continue
        pairs = (
            ("peak bytes", row.peak_bytes, rival.peak_bytes),
            ("recomputed FLOPs", row.recomputed.flops, rival.recomputed.flops),
            ("recomputed seconds", row.recomputed.seconds, max(rival.recomputed.seconds, 0.0)),
            ("step time ratio", row.ratio, rival.ratio),
        )
        cheapest = by_label.get(row.label.replace("ours at", f"ours{PRICED['flops']} at"))
        for name, mine, theirs in pairs:
            if mine <= theirs * (1 + 1e-9):
                continue
            said = f"{row.label}: {name} {mine:,.6g} against {theirs:,.6g}"
            if name == "recomputed FLOPs" and cheapest is not None:
                work, theirs_seconds = cheapest.recomputed, rival.recomputed.seconds
                said += f"; by FLOPs alone {work.flops:,.6g}, with {work.seconds:.4g} s against {theirs_seconds:.4g} s"
            if name == "recomputed seconds":
                said += f"; {row.note}"
            if name == "step time ratio":
                said += slower(row, rival, by_label)
            found.append(said)
    return found


def table(name: str, bench: Bench, rows: list[Row]) -> list[str]:
    """Markdown of one model."""
    step = bench.step_work
    lines = [
        f"## {name}",
        "",
        f"Step: {step.flops / 1e9:.2f} GFLOP, {1e3 * step.seconds:.1f} ms by the cost model. "
        f"Eager peaks at {rows[0].peak_bytes:,} bytes.",
        "",
        "| way | peak MiB | of eager | recomputed FLOPs % | recomputed seconds % | measured % | step time / eager | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        if row.model is None:
            lines.append(f"| {row.label} | - | - | - | - | - | - | {row.note} |")
            continue
        alone = row.recomputed.measured_seconds
        measured = f"{100 * alone / step.measured_seconds:.2f}" if alone and step.measured_seconds else "-"
        lines.append(
            f"| {row.label} | {row.peak_bytes / MIB:.2f} | {row.peak_bytes / rows[0].peak_bytes:.3f} "
            f"| {100 * row.recomputed.flops / step.flops:.2f} | {100 * row.recomputed.seconds / step.seconds:.2f} "
            f"| {measured} | {row.ratio:.3f} | {row.note} |"
        )
    lost = losses(rows)
    return [*lines, "", "Losses: " + ("none" if not lost else ""), *(f"- {loss}" for loss in lost), ""]


def section(name: str, kernels: str, options: argparse.Namespace) -> list[str]:
    """Markdown of one model with one sort of kernels."""
    torch.manual_seed(0)
    plans = options.plans / name if options.plans else None
    case = in_channels_last(MODELS[name]()) if options.channels_last else MODELS[name]()
    bench = Bench(case, kernels == "inductor", options.time_limit, plans)
    rivals = bench.rivals()
    rows = [rivals[0], bench.kept(), *rivals[1:]]
    for rival in rivals[1:]:
        if rival.recomputed.flops or rival.recomputed.seconds > 1e-9:
            rows += bench.ours_against(rival)
    bench.time_in_turn(rows, options.repeats)
    title = f"{name}, {'compiled by Inductor' if bench.inductor else 'eager kernels'}"
    return table(f"{title}, channels last" if options.channels_last else title, bench, rows)


def main() -> None:
    """Print one table per model and sort of kernels; write all of them to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=[m for m in MODELS if m != "tiny"])
    parser.add_argument("--kernels", nargs="+", choices=("eager", "inductor"), default=["eager"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--plans", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    lines = [
        "# Side by side",
        "",
        f"    python {' '.join(['examples/benchmarks/side_by_side.py', *sys.argv[1:]])}",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads, {options.repeats} rounds.",
        "",
        READING,
    ]
    print("\n".join(lines), flush=True)
    for kernels in options.kernels:
        for name in options.models:
            found = section(name, kernels, options)
            print("\n".join(found), flush=True)
            lines += found
            if options.markdown:  # after each model: a run is long
                options.markdown.parent.mkdir(parents=True, exist_ok=True)
                options.markdown.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

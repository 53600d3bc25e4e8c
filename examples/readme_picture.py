"""Draw the README's picture: memory over one step of a GPT-2, with everything kept and with a plan.

    python examples/readme_picture.py examples/guide/memory.svg [--layers 12] [--batch 8] [--budget 72%]

1024 wide, sequence 1024, bfloat16, on fake tensors, planned for an H100: no GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from plan_for_h100 import gpt2

from planner import plan
from planner.pictures.of_plan import memory_of_plan
from planner.pictures.svg import standalone


def main() -> None:
    """Plan, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", default="72%")
    options = parser.parse_args()
    model, inputs = gpt2(options.layers, options.width, options.batch)
    made = plan(model, options.budget, example_kwargs=inputs, device="h100-80gb", time_limit_seconds=20)
    print(made)
    picture = memory_of_plan(made)
    picture = dataclasses.replace(picture, lanes=picture.lanes[:5])
    Path(options.path).write_text(standalone(picture.svg(860, 280)), encoding="utf-8")


if __name__ == "__main__":
    main()

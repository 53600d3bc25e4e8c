"""Step time of the rewritten model against eager, on the CPU, taken in turn in one run.

    python examples/benchmarks/step_ratio.py [--budget 100%] [--repeats 15] [--models gpt2 resnet50 ...]

At ``100%`` and above the plan is store-all, so the ratio is the price of the rewriter itself. The ratio is that of the
medians; the ratio of the fastest steps stands beside it, since other processes can only slow a step down.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
from torch import nn

from planner import plan, rewrite
from planner.errors import NoScheduleError

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def gpt2() -> Case:
    """12 layers, 256 wide, sequence 256, batch 2, dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=12, n_embd=256, n_head=4, n_positions=256, vocab_size=2048, use_cache=False)
    ids = torch.randint(0, 2048, (2, 256))
    return GPT2LMHeadModel(config), (), {"input_ids": ids, "labels": ids}


def llama() -> Case:
    """8 layers, 256 wide, grouped heads, sequence 256, batch 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=8,
        hidden_size=256,
        intermediate_size=688,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=2048,
        use_cache=False,
    )
    ids = torch.randint(0, 2048, (2, 256))
    return LlamaForCausalLM(config), (), {"input_ids": ids, "labels": ids}


def vit() -> Case:
    """8 layers, 256 wide, 96 x 96 pixels, batch 8."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=8,
        hidden_size=256,
        intermediate_size=1024,
        num_attention_heads=4,
        image_size=96,
        patch_size=8,
        problem_type="single_label_classification",  # the first call would set it, and the second compile anew
    )
    labels = torch.zeros(8, dtype=torch.long)
    return ViTForImageClassification(config), (), {"pixel_values": torch.randn(8, 3, 96, 96), "labels": labels}


class Bottleneck(nn.Module):
    """ResNet's bottleneck block, with in-place ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        same = stride == 1 and channels == 4 * width
        down = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.skip = nn.Identity() if same else down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Body plus skip."""
        return F.relu(self.body(x) + self.skip(x), inplace=True)


class ResNet50(nn.Module):
    """ResNet-50 with its loss."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(3, 2, 1))
        channels = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(count):
                layers.append(Bottleneck(channels, width, stride if index == 0 else 1))
                channels = 4 * width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 100))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.layers(images), labels)


def resnet50() -> Case:
    """96 x 96 pixels, batch 4."""
    return ResNet50(), (torch.randn(4, 3, 96, 96), torch.zeros(4, dtype=torch.long)), {}


MODELS: dict[str, Callable[[], Case]] = {"gpt2": gpt2, "llama": llama, "vit": vit, "resnet50": resnet50}


def main() -> None:
    """Print one row per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="110%")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    print(
        f"{datetime.date.today()}  torch {torch.__version__}, {torch.get_num_threads()} threads  "
        f"Python {platform.python_version()}  budget {options.budget} of eager's peak"
    )
    print("model      eager ms  planned ms  ratio  ratio of fastest  predicted  recomputed")
    for name in options.models:
        torch.manual_seed(0)
        model, args, kwargs = MODELS[name]()
        plain = model.train()
        planned = copy.deepcopy(plain)
        try:
            made = plan(planned, options.budget, args, kwargs, gradient_accumulation=False)
        except NoScheduleError as error:
            print(f"{name:<9}  {str(error).split(';')[0]}")
            continue
        rewrite(planned, made)
        seconds: dict[str, list[float]] = {"plain": [], "planned": []}
        for repeat in range(options.repeats + 2):
            for label, module in (("plain", plain), ("planned", planned)):
                module.zero_grad()
                started = time.perf_counter()
                result = module(*args, **kwargs)
                (result if isinstance(result, torch.Tensor) else result.loss).backward()
                if repeat >= 2:  # the first ones compile and fill caches
                    seconds[label].append(time.perf_counter() - started)
        ours, theirs = seconds["planned"], seconds["plain"]
        recomputed = len(made.to_schedule().order) - len(made.to_graph())
        print(
            f"{name:<9}  {1e3 * statistics.median(theirs):8.1f}  {1e3 * statistics.median(ours):10.1f}  "
            f"{statistics.median(ours) / statistics.median(theirs):5.3f}  {min(ours) / min(theirs):16.3f}  "
            f"{1 + made.overhead:9.3f}  {recomputed:10d}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""The models of the benchmark tables at their real sizes, captured on fake tensors: no weights, no memory, no GPU.

    python examples/benchmarks/suite.py --folder GRAPHS [gpt2-12 resnet50 ...]    # captures and writes GRAPHS/NAME.json

bf16 where the model is a transformer, float32 elsewhere; one training step with its loss, first micro-batch; a
roofline of 150 TFLOP/s and 1.5 TB/s with 4 microseconds a launch. Tables read the files back with :func:`load`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graph_capture.capture import capture
from graph_capture.devices import calibrated
from graph_capture.graph import Graph

DEVICE = calibrated("roofline 150 TFLOP/s, 1.5 TB/s", 150e12, 1.5e12, 4e-6)

Inputs = tuple[nn.Module, dict[str, Any]]


def _ids(batch: int, length: int) -> Tensor:
    return torch.zeros(batch, length, dtype=torch.long)


def gpt2(layers: int) -> Inputs:
    """1024 wide, 16 heads, sequence 1024, batch 8."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=1024, n_head=16, attn_pdrop=0.0, use_cache=False)
    return GPT2LMHeadModel(config), {"input_ids": _ids(8, 1024), "labels": _ids(8, 1024)}


def llama(layers: int, width: int, heads: int, key_values: int, inner: int, vocabulary: int, length: int) -> Inputs:
    """Grouped key-value heads, batch 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=key_values,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": _ids(2, length), "labels": _ids(2, length)}


def t5() -> Inputs:
    """T5-base: 12 + 12 layers, batch 16, sequence 512."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12, use_cache=False, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), {"input_ids": _ids(16, 512), "labels": _ids(16, 512)}


def vit() -> Inputs:
    """ViT-B/16, batch 64."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=1000)
    pixels, labels = torch.zeros(64, 3, 224, 224, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.long)
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": labels}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a skip (He et al. 2015)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.c2, self.n2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.c3, self.n3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.skip = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 * width, H / stride, W / stride)."""
        y = self.relu(self.n1(self.c1(x)))
        y = self.relu(self.n2(self.c2(y)))
        return self.relu(self.n3(self.c3(y)) + self.skip(x))


class ResNet50(nn.Module):
    """3, 4, 6 and 3 bottleneck blocks; the loss is inside."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        inputs = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                layers.append(Bottleneck(inputs, 64 << stage, 2 if stage and not block else 1))
                inputs = 256 << stage
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(2048, 1000)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(N, 3, H, W) and (N,) to a scalar."""
        return F.cross_entropy(self.head(self.layers(x).mean((2, 3))), labels)


class UNet(nn.Module):
    """Four levels down and up, two 3x3 convolutions with BatchNorm each (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 64, levels: int = 4) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            first = (nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
            second = (nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
            return nn.Sequential(*first, *second)

        widths = [width << level for level in range(levels + 1)]
        self.down = nn.ModuleList([block(3 if i == 0 else widths[i - 1], widths[i]) for i in range(levels + 1)])
        self.shrink = nn.ModuleList([nn.ConvTranspose2d(widths[i + 1], widths[i], 2, 2) for i in range(levels)])
        self.up = nn.ModuleList([block(2 * widths[i], widths[i]) for i in range(levels)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """(N, 3, H, W) and (N, H, W) to a scalar."""
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        x = skips.pop()
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat([skips[level], self.shrink[level](x)], 1))
        return F.cross_entropy(self.head(x), target)


class DenseNet121(nn.Module):
    """6, 12, 24 and 16 dense layers of growth 32 (Huang et al. 2017)."""

    def __init__(self, growth: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        channels = 64
        for number, layers in enumerate((6, 12, 24, 16)):
            widths = [channels + i * growth for i in range(layers)]
            self.blocks.append(nn.ModuleList([self._layer(w, growth) for w in widths]))
            channels += layers * growth
            if number < 3:
                shrink = nn.Conv2d(channels, channels // 2, 1, bias=False)
                layer = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), shrink, nn.AvgPool2d(2))
                self.transitions.append(layer)
                channels //= 2
        self.norm, self.head = nn.BatchNorm2d(channels), nn.Linear(channels, 1000)

    @staticmethod
    def _layer(inputs: int, growth: int) -> nn.Sequential:
        narrow = (nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(inputs, 4 * growth, 1, bias=False))
        wide = (nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False))
        return nn.Sequential(*narrow, *wide)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(N, 3, H, W) and (N,) to a scalar."""
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            features = [x]
            for layer in block:  # pyright: ignore[reportGeneralTypeIssues]
                features.append(layer(torch.cat(features, 1)))
            x = torch.cat(features, 1)
            if number < 3:
                x = self.transitions[number](x)
        return F.cross_entropy(self.head(F.relu(self.norm(x)).mean((2, 3))), labels)


class LSTMModel(nn.Module):
    """A language model of two LSTM layers, 1024 wide."""

    def __init__(self, width: int = 1024, vocabulary: int = 10_000) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, T) to a scalar."""
        hidden, _ = self.lstm(self.embedding(ids))
        return F.cross_entropy(self.head(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _images(model: nn.Module, batch: int, size: int) -> Inputs:
    return model, {"x": torch.zeros(batch, 3, size, size), "labels": torch.zeros(batch, dtype=torch.long)}


def _unet() -> Inputs:
    return UNet(), {"x": torch.zeros(8, 3, 256, 256), "target": torch.zeros(8, 256, 256, dtype=torch.long)}


MODELS: Mapping[str, tuple[torch.dtype, Callable[[], Inputs]]] = MappingProxyType(
    {
        "gpt2-12": (torch.bfloat16, lambda: gpt2(12)),
        "gpt2-48": (torch.bfloat16, lambda: gpt2(48)),
        "llama-16": (torch.bfloat16, lambda: llama(16, 2048, 32, 8, 8192, 128_256, 2048)),
        "llama-80": (torch.bfloat16, lambda: llama(80, 8192, 64, 8, 28_672, 32_000, 4096)),
        "t5-base": (torch.bfloat16, t5),
        "vit-b16": (torch.bfloat16, vit),
        "resnet50": (torch.float32, lambda: _images(ResNet50(), 64, 224)),
        "unet": (torch.float32, _unet),
        "densenet121": (torch.float32, lambda: _images(DenseNet121(), 64, 224)),
        "lstm": (torch.float32, lambda: (LSTMModel(), {"ids": _ids(32, 64)})),
    }
)
"""Name -> (floating dtype, factory of a model and its keyword arguments)."""

_REAL = frozenset({"vit-b16"})
"""Models whose initialisation reads back what it drew, which fake tensors cannot answer."""


def graph_of(name: str) -> Graph:
    """Capture one model of :data:`MODELS`."""
    dtype, factory = MODELS[name]
    default = torch.get_default_dtype()
    with contextlib.nullcontext() if name in _REAL else FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            model, kwargs = factory()
        finally:
            torch.set_default_dtype(default)
    captured = capture(model.train(), (), kwargs, device=DEVICE, gradient_accumulation=False)
    return captured.graph


def load(folder: Path, name: str) -> Graph:
    """The graph in `folder`, captured and written there if it is missing."""
    path = folder / f"{name}.json"
    if not path.exists():
        graph = graph_of(name)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(graph.to_dict()), encoding="utf-8")
    return Graph.from_dict(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    """Capture the models and say how large their graphs are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    for name in options.names:
        began = time.perf_counter()
        graph = load(options.folder, name)
        print(
            f"{name:12} {len(graph):5} operators, {len(graph.values):5} values, step {graph.step_seconds:.3f} s, "
            f"resident {graph.resident_total_bytes / 2**30:.2f} GiB, {time.perf_counter() - began:.1f} s"
        )


if __name__ == "__main__":
    main()

"""Small models for tests and benchmarks, each with the inputs and the loss of one training step.

Every architecture keeps what makes it hard to plan: dropout, BatchNorm, in-place activations, tied weights, caches in
the output, skips, shared encoders. Sizes are chosen so that activations, not parameters, fill the memory. A factory
makes the same model and inputs every time and leaves the random state as it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

LossFn = Callable[[Any], Tensor]
VOCABULARY = 96


@dataclass(frozen=True)
class Case:
    """A model with the inputs of one training step; `loss_fn` if the model does not return its loss."""

    model: nn.Module
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss_fn: LossFn | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.args, self.kwargs, self.loss_fn))


Factory = Callable[[], Case]
MODELS: dict[str, Factory] = {}
"""Every model by name."""


def model(function: Factory) -> Factory:
    """Register a factory; it runs in training mode with a fixed seed and a forked random state."""

    @functools.wraps(function)
    def make() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            case = function()
        case.model.train()
        return case

    MODELS[function.__name__] = make
    return make


# Language and vision models from `transformers`, from a config.


def _tokens(batch: int = 4, length: int = 32) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def _gpt2(attention: str) -> Case:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    ids = _tokens()
    return Case(GPT2LMHeadModel(config), kwargs={"input_ids": ids, "labels": ids.clone()})


@model
def gpt2_eager() -> Case:
    """Attention written out, dropout at its default of 0.1, tied embeddings, a cache in the output."""
    return _gpt2("eager")


@model
def gpt2_sdpa() -> Case:
    """The fused attention kernel, which draws its own dropout."""
    return _gpt2("sdpa")


@model
def llama() -> Case:
    """Grouped key-value heads, rotary positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
        attn_implementation="eager",
    )
    ids = _tokens()
    return Case(LlamaForCausalLM(config), kwargs={"input_ids": ids, "labels": ids.clone()})


@model
def bert() -> Case:
    """Dropout everywhere, an attention mask."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    ids = _tokens()
    mask = torch.ones_like(ids)
    mask[0, 24:] = 0
    return Case(BertForMaskedLM(config), kwargs={"input_ids": ids, "attention_mask": mask, "labels": ids.clone()})


@model
def t5() -> Case:
    """Every decoder block reads the encoder's output; the embedding is shared three times."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    ids = _tokens()
    return Case(T5ForConditionalGeneration(config), kwargs={"input_ids": ids, "labels": _tokens(length=24)})


@model
def vit() -> Case:
    """A vision transformer with dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=24,
        patch_size=4,
        num_labels=10,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        attn_implementation="eager",
    )
    images, labels = torch.randn(4, 3, 24, 24), torch.randint(0, 10, (4,))
    return Case(ViTForImageClassification(config), kwargs={"pixel_values": images, "labels": labels})


@model
def whisper() -> Case:
    """Convolutions before an encoder and a decoder."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=32,
        max_target_positions=24,
        dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
        attn_implementation="eager",
    )
    audio = torch.randn(4, 8, 64)
    return Case(WhisperForConditionalGeneration(config), kwargs={"input_features": audio, "labels": _tokens(length=20)})


@model
def mixtral() -> Case:
    """Experts: which rows an expert gets depends on the data."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        attention_dropout=0.1,
        attn_implementation="eager",
    )
    ids = _tokens()
    return Case(MixtralForCausalLM(config), kwargs={"input_ids": ids, "labels": ids.clone()})


# Convolutions and recurrence in plain torch.


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, dropout and in-place ReLU around a skip."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.1)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.relu(self.first_norm(self.first(x))))
        return self.relu(self.second_norm(self.second(y)) + self.skip(x))


class ResNet(nn.Module):
    """A residual network that returns class scores."""

    def __init__(self, width: int = 8, blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        wide = 2 * width
        layers = [ResidualBlock(width, width) for _ in range(blocks)]
        layers += [ResidualBlock(width if i == 0 else wide, wide, 2 if i == 0 else 1) for i in range(blocks)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(wide, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


@model
def resnet() -> Case:
    """The loss is computed outside, by `loss_fn`."""
    labels = torch.randint(0, 10, (8,))
    return Case(ResNet(), (torch.randn(8, 3, 32, 32),), loss_fn=lambda scores: F.cross_entropy(scores, labels))


class UNet(nn.Module):
    """Two levels down, two up, skips between them; the loss is inside."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            first = (nn.Conv2d(inputs, outputs, 3, 1, 1), nn.GroupNorm(4, outputs), nn.SiLU())
            second = (nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(4, outputs), nn.SiLU())
            return nn.Sequential(*first, *second)

        self.down1, self.down2, self.middle = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.avg_pool2d(a, 2))
        c = self.middle(F.avg_pool2d(b, 2))
        b = self.up2(torch.cat([F.interpolate(c, scale_factor=2), b], 1))
        a = self.up1(torch.cat([F.interpolate(b, scale_factor=2), a], 1))
        return F.mse_loss(self.head(a), target)


@model
def unet() -> Case:
    """Skips that no chain solver can cut."""
    return Case(UNet(), (torch.randn(4, 3, 24, 24), torch.randn(4, 3, 24, 24)))


class DenseBlock(nn.Module):
    """Each layer reads the concatenation of all before it."""

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = [inputs + i * growth for i in range(layers)]
        self.norms = nn.ModuleList([nn.BatchNorm2d(w) for w in widths])
        self.convolutions = nn.ModuleList([nn.Conv2d(w, growth, 3, 1, 1, bias=False) for w in widths])

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            features.append(F.dropout(convolution(F.relu(norm(torch.cat(features, 1)))), 0.1, self.training))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them; the loss is inside."""

    def __init__(self, width: int = 8, growth: int = 6, layers: int = 4) -> None:
        super().__init__()
        middle = width + growth * layers
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        self.first = DenseBlock(width, growth, layers)
        self.transition = nn.Sequential(nn.BatchNorm2d(middle), nn.ReLU(), nn.Conv2d(middle, width, 1), nn.AvgPool2d(2))
        self.second = DenseBlock(width, growth, layers)
        self.head = nn.Linear(middle, 10)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        features = self.second(self.transition(self.first(self.stem(x))))
        return F.cross_entropy(self.head(F.relu(features).mean((2, 3))), labels)


@model
def densenet() -> Case:
    """Concatenations of growing width, BatchNorm, functional dropout."""
    return Case(DenseNet(), (torch.randn(4, 3, 24, 24), torch.randint(0, 10, (4,))))


class LSTMModel(nn.Module):
    """A language model with two LSTM layers and dropout between them."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(ids))
        return F.cross_entropy(self.head(hidden[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@model
def lstm() -> Case:
    """Recurrence: eager runs one fused kernel, a captured graph one step at a time."""
    return Case(LSTMModel(), (_tokens(8, 12),))


# Ways to take inputs and to return results.


class Perceptron(nn.Module):
    """A stack of wide layers with dropout; what the other small models build on."""

    def __init__(self, width: int = 32, layers: int = 6, dropout: float = 0.1) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout)) for _ in range(layers)]
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(width, 10)

    def features(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def features(batch: int = 256, width: int = 32) -> Tensor:
    """Inputs of a :class:`Perceptron`."""
    return torch.randn(batch, width)


class ReturnsTuple(Perceptron):
    """Returns (scores, (features, a constant)): the loss is outside and reads only the scores."""

    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        return self.head(y), (y, 3)


@model
def returns_tuple() -> Case:
    """Nested tuples; an output that the loss does not come from."""
    return Case(ReturnsTuple(), (features(),), loss_fn=lambda result: result[0].square().mean())


class ReturnsDict(Perceptron):
    """Takes nested inputs; returns loss and scores in a dict."""

    def forward(self, batch: Mapping[str, Any], *, scale: float = 1.0) -> dict[str, Tensor]:
        scores = self.head(self.features(batch["inputs"][0])) * scale
        return {"scores": scores, "loss": F.cross_entropy(scores, batch["labels"])}


@model
def returns_dict() -> Case:
    """Nested (pytree) inputs, a keyword-only number, a dict with the loss in it."""
    batch = {"inputs": [features()], "labels": torch.randint(0, 10, (256,))}
    return Case(ReturnsDict(), (batch,), {"scale": 0.5})


@dataclasses.dataclass
class Prediction:
    """What :class:`ReturnsDataclass` returns."""

    loss: Tensor
    scores: Tensor


register_dataclass(Prediction)


class ReturnsDataclass(Perceptron):
    """Returns loss and scores in a dataclass."""

    def forward(self, x: Tensor, labels: Tensor) -> Prediction:
        scores = self.head(self.features(x))
        return Prediction(F.cross_entropy(scores, labels), scores)


@model
def returns_dataclass() -> Case:
    """A dataclass with the loss in it."""
    return Case(ReturnsDataclass(), (features(), torch.randint(0, 10, (256,))))


class NamesInput(Perceptron):
    """Its argument is called `input`; the caller's loss is the sum of the result."""

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.features(input))


@model
def names_input() -> Case:
    """An argument named `input`; the loss is `out.sum()`."""
    return Case(NamesInput(), kwargs={"input": features()}, loss_fn=torch.sum)

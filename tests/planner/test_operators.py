"""Operators and results of unusual kinds: planned, and bit for bit what autograd gives, or one clear error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from planner import plan, rewrite
from planner.errors import CaptureError
from tests.planner.stress import RecomputeAlways

Function = Callable[["Layers", Tensor], Any]


class Layers(nn.Module):
    """Two linear layers, and what a test does with them."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)

    def hidden(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def complex(self, x: Tensor) -> Tensor:
        return torch.complex(self.first(x), self.hidden(x))

    def positive(self, x: Tensor) -> Tensor:
        """A positive definite matrix."""
        h = self.hidden(x)
        return h.t() @ h + 2 * torch.eye(8)


def some_loss(result: Any) -> Tensor:
    """A scalar that every tensor of a result enters, with gradients that differ."""
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([(t.abs() if t.is_complex() else t).sin().sum() * (i + 1) for i, t in enumerate(tensors)]).sum()


def _step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    torch.manual_seed(3)
    result = model(x)
    values = [t.detach().resolve_conj().clone() for t in tree_leaves(result) if isinstance(t, Tensor)]
    some_loss(result).backward()
    return [*values, *(p.grad for p in model.parameters()), *model.buffers(), torch.get_rng_state()]


def assert_equal(model: nn.Module, x: Tensor) -> None:
    """Two steps of the plain model and of plans that keep everything and nothing; the second one accumulates."""
    plain = copy.deepcopy(model)
    expected = [[None if t is None else t.clone() for t in _step(plain, x.clone())] for _ in range(2)]
    for solver in (None, RecomputeAlways()):
        planned = copy.deepcopy(model)
        rewrite(planned, plan(planned, "1TiB", (x,), loss_fn=some_loss, solver=solver))
        for step in expected:
            for mine, theirs in zip(_step(planned, x.clone()), step, strict=True):
                assert mine is None if theirs is None else mine is not None and torch.equal(mine, theirs)


SHARED: dict[str, Function] = {
    "two halves": lambda m, x: (lambda h: (h[:, :4], h[:, 4:]))(m.hidden(x)),
    "halves that overlap, and the whole": lambda m, x: (lambda h: (h[:, :6], h[:, 2:], h))(m.hidden(x)),
    "transposed, and the whole": lambda m, x: (lambda h: (h.t(), h))(m.hidden(x)),
    "pieces": lambda m, x: m.hidden(x).chunk(2, 1),
    "rows, and the whole": lambda m, x: (lambda h: (*h.unbind(0), h, h[1:]))(m.hidden(x)),
    "one tensor twice": lambda m, x: (lambda h: (h, h))(m.hidden(x)),
    "real and imaginary part": lambda m, x: (lambda z: (z.real, z.imag))(m.complex(x).exp()),
    "conjugate, and itself": lambda m, x: (lambda z: (z.conj(), z))(m.complex(x)),
    "views of a parameter": lambda m, x: (m.hidden(x), m.first.weight[:4], m.second.weight.t()),
    "a part, and what has no gradient": lambda m, x: (lambda h: (h[1:], h.detach()))(m.hidden(x)),
    "views of the input": lambda m, x: (x[1:], x, m.hidden(x)),
}


@pytest.mark.parametrize("name", SHARED)
def test_results_that_share_their_memory(name: str) -> None:
    assert_equal(Layers(SHARED[name]), torch.randn(4, 8))


def test_one_of_two_views_alone_gives_gradients_to_no_more_than_in_eager() -> None:
    model, x = Layers(lambda m, x: (m.hidden(x), m.second.weight[:4], m.second.weight[2:])), torch.randn(4, 8)
    rewrite(model, plan(model, "1TiB", (x,), loss_fn=some_loss))
    model(x)[2].sum().backward()
    assert model.first.weight.grad is None
    assert model.second.weight.grad is not None


def test_results_that_share_their_memory_are_not_written_to_in_silence() -> None:
    model, x = Layers(SHARED["transposed, and the whole"]), torch.randn(4, 8)
    rewrite(model, plan(model, "1TiB", (x,), loss_fn=some_loss))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        model(x)[1].mul_(2)


ALGEBRA: dict[str, Function] = {
    "inv": lambda m, x: torch.linalg.inv(m.positive(x)) @ m.second(x).t(),
    "solve": lambda m, x: torch.linalg.solve(m.positive(x), m.second(x).t()),
    "solve_triangular": lambda m, x: torch.linalg.solve_triangular(m.positive(x).tril(), m.second(x).t(), upper=False),
    "cholesky": lambda m, x: torch.cholesky_solve(m.second(x).t(), torch.linalg.cholesky(m.positive(x))),
    "det": lambda m, x: torch.linalg.det(m.positive(x)),
    "slogdet": lambda m, x: torch.linalg.slogdet(m.positive(x))[1],
    "svd": lambda m, x: torch.linalg.svd(m.positive(x))[1],
    "qr": lambda m, x: torch.linalg.qr(m.positive(x)),
    "eigh": lambda m, x: torch.linalg.eigh(m.positive(x))[0],
    "eigvals": lambda m, x: torch.linalg.eigvals(m.positive(x)).abs(),
    "lu": lambda m, x: torch.linalg.lu_solve(*torch.linalg.lu_factor(m.positive(x)), m.second(x).t()),
    "matrix_exp": lambda m, x: torch.matrix_exp(m.positive(x) / 10),
    "matrix_power": lambda m, x: torch.linalg.matrix_power(m.positive(x), -2),
    "pinv": lambda m, x: torch.linalg.pinv(m.positive(x)),
}


@pytest.mark.parametrize("name", ALGEBRA)
def test_linear_algebra(name: str) -> None:
    assert_equal(Layers(ALGEBRA[name]), torch.randn(4, 8))


def test_a_singular_matrix_is_said_as_in_eager() -> None:
    model, x = Layers(lambda m, x: torch.linalg.inv(m.hidden(x).t() @ m.hidden(x))), torch.zeros(4, 8)
    nn.init.zeros_(model.first.bias)
    rewrite(model, plan(model, "1TiB", (x,), loss_fn=some_loss, solver=RecomputeAlways()))
    with pytest.raises(RuntimeError, match="singular"):
        model(x)


def test_least_squares_are_refused() -> None:
    model, x = Layers(lambda m, x: torch.linalg.lstsq(m.positive(x), m.second(x).t()).solution), torch.randn(4, 8)
    with pytest.raises(CaptureError, match="depends on input Tensor data"):
        plan(model, "1TiB", (x,), loss_fn=some_loss)


PLAIN_GRADIENTS: dict[str, Function] = {
    "a sum of a parameter": lambda m, x: m.hidden(x).sum() + m.second.weight.sum(),
    "sums of rows": lambda m, x: (m.hidden(x), m.second.weight.sum(0)),
    "a parameter added to a constant": lambda m, x: m.second.bias + x[0],
    "a view of a parameter, added to": lambda m, x: (m.hidden(x), m.second.weight.view(-1) + 1),
    "two parameters added": lambda m, x: (m.hidden(x), m.first.weight + m.second.weight),
    "a parameter as a result": lambda m, x: (m.hidden(x), m.second.weight),
}


@pytest.mark.parametrize("name", PLAIN_GRADIENTS)
def test_gradients_that_no_operator_makes(name: str) -> None:
    """The gradient of the parameter is the loss's own gradient, or a view of it."""
    assert_equal(Layers(PLAIN_GRADIENTS[name]), torch.randn(4, 8))


EMPTY: dict[str, Function] = {
    "along the features": lambda m, x: m.second(m.first(x).softmax(-1)),
    "along the batch": lambda m, x: m.second(m.first(x).softmax(0)),
    "beside a parameter": lambda m, x: m.first(x).softmax(-1).sum() + m.second.weight.sum(),
    "twice": lambda m, x: m.second(m.hidden(x).log_softmax(-1).sin()).softmax(-1),
    "cross-entropy": lambda m, x: F.cross_entropy(m.first(x), torch.zeros(len(x), dtype=torch.long), reduction="sum"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_through_a_softmax(name: str) -> None:
    assert_equal(Layers(EMPTY[name]), torch.randn(0, 8))


COMPLEX: dict[str, Function] = {
    "real part of a conjugate": lambda m, x: m.complex(x).conj().real,
    "imaginary part of a conjugate": lambda m, x: m.complex(x).conj().imag,
    "a conjugate carried out": lambda m, x: torch.view_as_real(m.complex(x).conj().resolve_conj()).sin(),
    "a conjugate copied": lambda m, x: m.complex(x).conj().clone().imag,
    "product with a conjugate": lambda m, x: torch.view_as_real((m.complex(x) * 2).conj() * m.complex(x).exp()).sin(),
    "over a conjugate": lambda m, x: torch.view_as_real((m.complex(x).conj() * 3).sin()).sin(),
    "adjoint": lambda m, x: (m.complex(x).mH @ m.complex(x)).abs(),
    "a negative carried out": lambda m, x: (m.complex(x).conj().imag.resolve_neg() * m.second(x)).view(-1),
    "complex result": lambda m, x: m.complex(x) * 2,
    "conjugate as a result": lambda m, x: m.complex(x).conj(),
    "negative as a result": lambda m, x: torch.view_as_real(m.complex(x).conj().resolve_conj() * 2).neg(),
    "product of spectra": lambda m, x: torch.fft.irfft(torch.fft.rfft(m.first(x)) * torch.fft.rfft(m.second(x)).conj()),
    "spectrum": lambda m, x: torch.fft.fft(m.first(x)).conj().real.sin(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name: str) -> None:
    assert_equal(Layers(COMPLEX[name]), torch.randn(64, 8))


def test_a_gradient_that_arrives_as_a_conjugate() -> None:
    model, x = Layers(lambda m, x: m.complex(x).exp()), torch.randn(4, 8)

    def loss_fn(z: Tensor) -> Tensor:
        return (z.conj() * torch.arange(8) * (1 + 2j)).imag.sum()

    plain = copy.deepcopy(model)
    loss_fn(plain(x)).backward()
    rewrite(model, plan(model, "1TiB", (x,), loss_fn=loss_fn))
    loss_fn(model(x)).backward()
    assert torch.equal(model.first.weight.grad, plain.first.weight.grad)  # type: ignore[arg-type]


MODES = {
    "nearest": (1, 2, 3),
    "nearest-exact": (2,),
    "linear": (1,),
    "bilinear": (2,),
    "bicubic": (2,),
    "trilinear": (3,),
}


@pytest.mark.parametrize(("mode", "dimensions"), [(m, d) for m, ds in MODES.items() for d in ds])
def test_interpolation_is_eagers(mode: str, dimensions: int) -> None:
    def up(m: Layers, x: Tensor) -> Tensor:
        return F.interpolate(m.hidden(x).view(1, 2, *(4, 2, 2)[:dimensions], -1)[..., 0], scale_factor=3, mode=mode)

    model, x = Layers(up), torch.randn(4, 8)
    targets = [o.target for o in plan(model, "1TiB", (x,), loss_fn=some_loss).to_graph().operators if o.phase != "loss"]
    assert sum("upsample" in target for target in targets) == 2
    assert_equal(model, x)


TARGETS = torch.tensor([[1, 2, -1, 0, 0, 0, 0, 0]] * 4)
LOSSES: dict[str, Function] = {
    "multi_margin_loss": lambda m, x: F.multi_margin_loss(m.first(x), TARGETS[:, 1]),
    "multilabel_margin_loss": lambda m, x: F.multilabel_margin_loss(m.first(x), TARGETS),
    "multilabel_soft_margin_loss": lambda m, x: F.multilabel_soft_margin_loss(m.first(x), (x > 0).float()),
    "binary_cross_entropy": lambda m, x: F.binary_cross_entropy(m.first(x).sigmoid(), x.sigmoid()),
    "kl_div": lambda m, x: F.kl_div(m.first(x), x.softmax(-1), reduction="batchmean"),
    "huber_loss": lambda m, x: F.huber_loss(m.first(x), x) + F.smooth_l1_loss(m.first(x), x),
    "triplet_margin_loss": lambda m, x: F.triplet_margin_loss(m.first(x), m.second(x), x),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_eagers(name: str) -> None:
    """Torch's decompositions of the first two compute, or round, otherwise."""
    assert_equal(Layers(LOSSES[name]), torch.randn(4, 8))


def _written(m: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
    x[0].copy_(m.first(x.clone())[0])
    return m.second(m.first(x.clone()).tanh()), x


def test_an_input_that_the_forward_makes_depend_on_parameters() -> None:
    assert_equal(Layers(_written), torch.randn(4, 8))


def test_an_embedding_that_renormalises_its_weight() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0), nn.Linear(8, 8))
    assert_equal(model, torch.randint(10, (4, 3)))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "sparse gradients": (
        lambda: nn.Sequential(nn.Embedding(10, 8, sparse=True), nn.Linear(8, 8)),
        torch.tensor([1, 2]),
        "sparse=True",
    ),
    "lazy parameters": (lambda: nn.Sequential(nn.LazyLinear(8)), torch.ones(4, 8), "'0.weight' .* has no shape yet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_clear_error(name: str) -> None:
    make, x, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        plan(make(), "1TiB", (x,), loss_fn=some_loss)

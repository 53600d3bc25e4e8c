"""The callback for Lightning: the same training, bit for bit, within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("lightning", reason="lightning is an optional extra")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from planner import RewriteError
from planner.lightning_callback import CheckpointPlannerCallback, planned_module
from planner.planned_call import planned_call
from tests.planner.stress import RecomputeAlways

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:.*planned.*")]


class Network(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1)) for _ in range(3)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm1d(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).float().square().mean()


class Wrapped(LightningModule):
    """Logs in its steps, and has a metric without trainable parameters beside the network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.metric = nn.BatchNorm1d(3, affine=False)
        self.network = Network()
        self.losses: list[Tensor] = []

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss = self.network(x)
        self.log("loss", loss)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, x: Tensor, index: int) -> None:
        self.losses.append(self.network(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(model: LightningModule, folder: Path, *callbacks: Callback, resume: Path | None = None, **changes: Any) -> None:
    """Two epochs of 20 rows by 8: the last batch is smaller; validation between the epochs."""
    data = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "gradient_clip_val": 0.5,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": str(folder),
    }
    trainer = Trainer(callbacks=list(callbacks), **(options | changes))
    torch.manual_seed(2)
    trainer.fit(model, DataLoader(data, 8), DataLoader(data, 8), ckpt_path=resume, weights_only=False)  # type: ignore[arg-type]


def assert_equal(given: Wrapped, expected: Wrapped) -> None:
    """Losses, parameters and buffers, bit for bit."""
    assert len(given.losses) == len(expected.losses)
    assert all(torch.equal(a, b) for a, b in zip(given.losses, expected.losses, strict=True))
    assert list(given.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in given.state_dict().items())


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=["plain", "accumulation", "bf16"]
)
def test_the_same_training(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, planned = Wrapped(), Wrapped()
    fit(plain, tmp_path, **changes)
    callback = CheckpointPlannerCallback("1GiB", solver=RecomputeAlways())
    fit(planned, tmp_path, callback, **changes)
    assert planned_call(planned.network) is None
    assert_equal(planned, plain)
    assert callback.plan is not None
    assert callback.plan.overhead > 0.1
    covers = dict(callback.plan.budget.covers)
    trained = sum(p.numel() for p in planned.parameters())
    assert 8 * trained <= covers["optimizer state"] <= 8 * trained + 4 * 8
    assert "gradients already accumulated" in covers


def test_saved_and_resumed(tmp_path: Path) -> None:
    plain, first, second = Wrapped(), Wrapped(), Wrapped()
    fit(plain, tmp_path / "plain")
    saver = ModelCheckpoint(tmp_path / "saved", filename="one")
    fit(first, tmp_path, CheckpointPlannerCallback("1GiB", solver=RecomputeAlways()), saver, max_epochs=1)
    resumed = CheckpointPlannerCallback("1GiB", solver=RecomputeAlways(), module="network")
    torch.manual_seed(2)
    fit(second, tmp_path, resumed, resume=tmp_path / "saved" / "one.ckpt")
    assert list(second.state_dict()) == list(plain.state_dict())
    assert resumed.plan is not None
    loaded = torch.load(tmp_path / "saved" / "one.ckpt", weights_only=False)["state_dict"]
    assert list(loaded) == list(plain.state_dict())
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in loaded.items())


class Scattered(LightningModule):
    """Its layers are in no module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)


def test_the_module_must_be_one() -> None:
    with pytest.raises(RewriteError, match="'encoder', 'decoder'"):
        planned_module(Scattered(), None)
    with pytest.raises(RewriteError, match="no module 'middle'"):
        planned_module(Scattered(), "middle")
    model = Scattered()
    assert planned_module(model, "decoder") is model.decoder


def test_a_step_that_does_not_call_the_module_is_an_error(tmp_path: Path) -> None:
    class Around(Wrapped):
        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.network.forward(x)

    model = Around()
    with pytest.raises(RewriteError, match="has not called Network"):
        fit(model, tmp_path, CheckpointPlannerCallback("90%"))
    assert planned_call(model.network) is None

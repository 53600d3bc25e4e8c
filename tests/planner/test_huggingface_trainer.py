"""The callback for the Hugging Face `Trainer`: the same training, bit for bit, within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is an optional extra")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from planner import Plan, RewriteError
from planner.huggingface_trainer import CheckpointPlannerCallback
from planner.planned_call import planned_call
from solvers.chen import ChenGreedy
from tests.planner.stress import RecomputeAlways

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
ALWAYS = RecomputeAlways()


def rows(count: int) -> list[dict[str, Tensor]]:
    """Sequences that count up."""
    ids = (torch.arange(count)[:, None] * 7 + torch.arange(16)) % 64
    return [{"input_ids": row, "labels": row} for row in ids]


def make_model() -> GPT2LMHeadModel:
    """Dropout at its default of 0.1, tied embeddings."""
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM", **size))


class Log(TrainerCallback):
    """Keeps losses and gradient norms."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen += [(k, v) for k, v in logs.items() if k in ("loss", "eval_loss", "grad_norm")]


def make_trainer(folder: Path, model: GPT2LMHeadModel, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    """Two epochs of 10 rows by 4: the last batch is smaller; evaluation between the epochs."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "epoch",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**(options | changes))
    return Trainer(model, arguments, train_dataset=rows(10), eval_dataset=rows(6), callbacks=list(callbacks))


def run(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """What was logged, and the model after it."""
    model, log = make_model(), Log()
    make_trainer(folder, model, log, *callbacks, **changes).train()
    assert planned_call(model) is None
    return log.seen, model.state_dict()


def assert_equal(given: tuple[list[Any], dict[str, Tensor]], expected: tuple[list[Any], dict[str, Tensor]]) -> None:
    """Logs and parameters, bit for bit."""
    assert given[0] == expected[0]
    assert list(given[1]) == list(expected[1])
    assert all(torch.equal(value, expected[1][name]) for name, value in given[1].items())


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=["plain", "accumulation", "bf16"]
)
def test_the_same_training(tmp_path: Path, changes: dict[str, Any]) -> None:
    callback = CheckpointPlannerCallback("1GiB", solver=ALWAYS)
    assert_equal(run(tmp_path, callback, **changes), run(tmp_path, **changes))
    assert callback.plan is not None
    assert callback.plan.overhead > 0.2
    covers = dict(callback.plan.budget.covers)
    parameters = sum(p.numel() for p in make_model().parameters())
    assert 8 * parameters <= covers["optimizer state"] <= 8 * parameters + 8 * 50
    assert ("gradients already accumulated" in covers) == bool(changes.get("gradient_accumulation_steps"))


def test_a_budget_in_percent_and_a_second_run(tmp_path: Path) -> None:
    plans: list[Plan] = []
    callback = CheckpointPlannerCallback("95%", on_plan=plans.append, solver=ChenGreedy())
    model = make_model()
    trainer = make_trainer(tmp_path, model, callback, max_steps=1)
    trainer.train()
    trainer.train()
    (made,) = plans
    assert made.predicted_peak_bytes <= made.budget_bytes
    assert callback.plan is made


def test_saved_and_resumed(tmp_path: Path) -> None:
    """With the optimizer's state from the checkpoint, and a plan from a file."""
    saving = {"save_strategy": "epoch"}
    expected = run(tmp_path / "whole", **saving)
    folder, path = tmp_path / "planned", tmp_path / "plan.json"
    first = CheckpointPlannerCallback("1GiB", solver=ALWAYS, on_plan=lambda made: made.save(path))
    make_trainer(folder, make_model(), first, **saving).train()
    resumed = make_model()
    callback = CheckpointPlannerCallback(plan=path, on_change="error")
    make_trainer(folder, resumed, callback, **saving).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert all(torch.equal(value, expected[1][name]) for name, value in resumed.state_dict().items())
    plain = GPT2LMHeadModel.from_pretrained(folder / "checkpoint-6")
    assert all(torch.equal(value, expected[1][name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("switch", ["activation_checkpointing", "torch_compile"])
def test_two_at_once_is_an_error(tmp_path: Path, switch: str) -> None:
    trainer = make_trainer(tmp_path, make_model(), CheckpointPlannerCallback("90%"), **{switch: True})
    with pytest.raises(RewriteError, match=switch):
        trainer.train()


def test_the_models_own_switch_is_an_error(tmp_path: Path) -> None:
    model = make_model()
    model.activation_checkpointing_enable()
    trainer = make_trainer(tmp_path, model, CheckpointPlannerCallback("90%"))
    with pytest.raises(RewriteError, match=r"transformer\.gradient_checkpointing is True"):
        trainer.train()


def test_a_step_that_does_not_call_the_model_is_an_error(tmp_path: Path) -> None:
    class Around(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return model.forward(**inputs).loss

    made = make_trainer(tmp_path, make_model(), CheckpointPlannerCallback("90%"))
    trainer = Around(made.model, made.args, train_dataset=rows(4), eval_dataset=rows(4))
    trainer.add_callback(CheckpointPlannerCallback("90%"))
    with pytest.raises(RewriteError, match="has not called GPT2LMHeadModel"):
        trainer.train()


def test_what_the_callback_is_given() -> None:
    with pytest.raises(ValueError, match="not both"):
        CheckpointPlannerCallback()
    with pytest.raises(ValueError, match="unit"):
        CheckpointPlannerCallback("12")

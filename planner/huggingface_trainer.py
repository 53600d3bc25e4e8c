"""A callback for the Hugging Face `Trainer`: it trains within a memory budget.

    from planner.huggingface_trainer import CheckpointPlannerCallback

    trainer = Trainer(model, args, train_dataset=..., callbacks=[CheckpointPlannerCallback("12GiB")])

The model is planned at the first training step, with that step's own inputs, as accelerate has prepared it: under its
autocast, on its device, inside of DDP. `activation_checkpointing` is not needed any more, and is an
error beside a plan; so it is under its older name, `gradient_checkpointing`.

Written for transformers 5.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from planner.auto_checkpoint import OnPlan
from planner.backend import Compiler
from planner.budget import Budget
from planner.decide import OnChange
from planner.errors import RewriteError
from planner.plan_file import Plan
from planner.trainer_session import TrainerSession

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "planner.huggingface_trainer is a callback for the Trainer of transformers: pip install transformers accelerate"
    ) from error


class CheckpointPlannerCallback(TrainerCallback):
    """Lets the `Trainer`'s model train within a budget, from the start of `train()` to its end.

    **Arguments:**

    - `budget`: bytes, `"12GiB"`, or `"60%"` of what eager would need; or `plan`: a :class:`~planner.Plan` or its file,
      as this callback made it in another run (the `Trainer` calls a model with an argument of its own, the number of
      tokens, which changes the graph).
    - `on_plan`: called with the plan once it is made, to print or save it; it is the attribute `plan` from then on.
    - `on_change`, `compiler`: as in :func:`planner.rewrite`. `options`: as in :func:`planner.plan`.

    The optimizer's state is a line of the budget, in a DDP run the buckets are another, and `.grad` is taken to be
    there from the start if gradients are accumulated; `extra_bytes` and `gradient_accumulation` say otherwise.
    Evaluation and prediction run the plain model, and so does whoever gets it after `train()`.

    `on_train_begin` raises :class:`~planner.errors.RewriteError` beside what replaces the model's forward or its
    wrapper: activation checkpointing of its own, `torch_compile`, `DataParallel`, FSDP, DeepSpeed.
    """

    def __init__(
        self,
        budget: int | str | Budget | None = None,
        *,
        plan: Plan | str | os.PathLike[str] | None = None,
        on_plan: OnPlan | None = None,
        on_change: OnChange = "replan",
        compiler: Compiler | None = None,
        **options: Any,
    ) -> None:
        self._session = TrainerSession(budget, plan, on_plan, on_change, compiler, options)

    @property
    def plan(self) -> Plan | None:
        """The plan, once there is one."""
        return self._session.plan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model and the optimizer are prepared: let the next training step be a planned one."""
        model: nn.Module = kwargs["model"]
        _refuse(args)
        accumulates = args.gradient_accumulation_steps > 1
        buckets = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        extra = {"DDP's buckets": buckets} if args.world_size > 1 else {}
        self._session.start(model, [kwargs["optimizer"]], {"gradient_accumulation": accumulates}, extra)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step without the planned model would be one without a budget."""
        self._session.check_used("compute_loss must call the model itself, as model(**inputs).")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model is a plain one again."""
        self._session.end()


def _refuse(args: TrainingArguments) -> None:
    switches = {
        "activation_checkpointing": "a plan decides by itself what is kept and what is recomputed",
        "gradient_checkpointing": "a plan decides by itself what is kept and what is recomputed",
        "torch_compile": "it would compile the model without its plan. For Inductor's kernels use "
        "CheckpointPlannerCallback(..., compiler='inductor')",
        "fsdp": "it shards the model block by block, and so it must be planned: planner.plan_blocks, fully_shard",
        "deepspeed": "it replaces the model by an engine of its own",
    }
    for switch, reason in switches.items():
        if getattr(args, switch, None):
            raise RewriteError(
                f"TrainingArguments.{switch} is on beside CheckpointPlannerCallback: {reason}. Switch it off."
            )
    if args.n_gpu > 1:
        raise RewriteError(
            f"the Trainer would copy the model to {args.n_gpu} GPUs at every step (DataParallel), and a copy has no "
            "plan. Start it with torchrun (DDP), or let it see one GPU."
        )

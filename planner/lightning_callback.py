"""A callback for Lightning's `Trainer`: it trains within a memory budget.

    from planner.lightning_callback import CheckpointPlannerCallback

    trainer = Trainer(callbacks=[CheckpointPlannerCallback("12GiB")])

What is planned is a module *inside of* the `LightningModule`, not its `training_step`: a `training_step` logs, counts
and talks to its trainer, which no captured graph can hold, and in a DDP run Lightning calls it in the place of the
forward. The module is planned at its first call in training mode, with that call's own inputs, under Lightning's
autocast. Let it return its loss: what `training_step` computes after it is not in the budget.

Written for Lightning 2, as `lightning` or as `pytorch_lightning`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import nn

from planner.auto_checkpoint import OnPlan
from planner.backend import Compiler
from planner.budget import Budget
from planner.decide import OnChange
from planner.errors import RewriteError
from planner.plan_file import Plan
from planner.trainer_session import TrainerSession

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError(
                "planner.lightning_callback is a callback for Lightning's Trainer: pip install lightning"
            ) from error

SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class CheckpointPlannerCallback(Callback):
    """Lets a module of the `LightningModule` train within a budget, from the start of `fit()` to its end.

    **Arguments:**

    - `budget`: bytes, `"12GiB"`, or `"60%"` of what eager would need; or `plan`: a :class:`~planner.Plan` or its file.
    - `module`: name of the module that is planned, as `"model"` or `"model.encoder"`. Without it the one child of the
      `LightningModule` that has all of its trainable parameters.
    - `on_plan`: called with the plan once it is made, to print or save it; it is the attribute `plan` from then on.
    - `on_change`, `compiler`: as in :func:`planner.rewrite`. `options`: as in :func:`planner.plan`, `loss_fn` included,
      for a module that does not return its loss.

    The optimizers' state is a line of the budget, and in a DDP run the buckets are another. Parameters outside of the
    module are a line, too. Lightning sets gradients to `None` after the forward, so that `.grad` is there from the
    start. Validation and prediction run the plain model, and so does whoever gets it after `fit()`.

    Raises :class:`~planner.errors.RewriteError` at the start of the fit if there is no such module, for strategies that
    shard (plan their blocks with :func:`planner.plan_blocks`), and for activation checkpointing of the model's own.
    """

    def __init__(
        self,
        budget: int | str | Budget | None = None,
        *,
        plan: Plan | str | os.PathLike[str] | None = None,
        module: str | None = None,
        on_plan: OnPlan | None = None,
        on_change: OnChange = "replan",
        compiler: Compiler | None = None,
        **options: Any,
    ) -> None:
        self.module = module
        self._session = TrainerSession(budget, plan, on_plan, on_change, compiler, options)

    @property
    def plan(self) -> Plan | None:
        """The plan, once there is one."""
        return self._session.plan

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Model and optimizers are where they train: let the module's next call in training be a planned one."""
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDING:
            raise RewriteError(
                f"{strategy} shards or replaces the model, which no plan of a whole module can hold. Plan its blocks "
                "with planner.plan_blocks in configure_model, before fully_shard."
            )
        model = planned_module(pl_module, self.module)
        inside = {id(p) for p in model.parameters()}
        outside = [p for p in pl_module.parameters() if id(p) not in inside]
        extra = {"parameters outside of the planned module": sum(p.numel() * p.element_size() for p in outside)}
        if trainer.world_size > 1:
            trained = (p for p in pl_module.parameters() if p.requires_grad)
            extra["DDP's buckets"] = sum(p.numel() * p.element_size() for p in trained)
        self._session.start(model, list(trainer.optimizers), {}, extra)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """A step without the planned module would be one without a budget."""
        self._session.check_used("training_step must call the module itself; name another with module='...'.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is a plain one again."""
        self._session.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The module is a plain one again."""
        self._session.end()


def planned_module(pl_module: nn.Module, name: str | None) -> nn.Module:
    """The module of a `LightningModule` that is planned; raises :class:`~planner.errors.RewriteError`."""
    kind = type(pl_module).__name__
    if name is not None:
        found = dict(pl_module.named_modules()).get(name)
        if found is None or found is pl_module:
            children = ", ".join(repr(child) for child, _ in pl_module.named_children())
            raise RewriteError(f"{kind} has no module {name!r} inside of it to plan; its children are {children}.")
        return found
    wanted = {id(p) for p in pl_module.parameters() if p.requires_grad}
    for _, child in pl_module.named_children():
        if wanted <= {id(p) for p in child.parameters()}:
            return child
    trained = [child for child, m in pl_module.named_children() if any(p.requires_grad for p in m.parameters())]
    raise RewriteError(
        f"the trainable parameters of {kind} are not all in one module, but in {', '.join(map(repr, trained))} or in "
        f"{kind} itself, and a plan bounds one module. Put the layers into one module that training_step calls, "
        "or name the one that needs the memory: CheckpointPlannerCallback(..., module='...')."
    )

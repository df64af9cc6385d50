"""What moves the weights: AdamW with a learning rate of its own for the reasoner, warm-up then cosine."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from smollm_trm.models.reasoners.reasoner import ParameterGroup, Reasoner
from smollm_trm.records import UserMistake, check_choices, check_range

BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4  # peak learning rate of the LoRA adapter (of all base weights, where those are trained)
    trm_learning_rate: float | None = None
    """Peak learning rate of the reasoner; None takes five times `learning_rate`. The recursion's network, called many
    times per step, gets this divided by its calls with gradient."""
    weight_decay: float = 0.01  # decoupled weight decay, on matrices only
    warmup_fraction: float = 0.1  # share of the run's optimizer steps in which the learning rate climbs to its peak
    optimizer: str = "adamw"  # or "adamw_8bit", of bitsandbytes

    def __post_init__(self) -> None:
        for name in ("learning_rate", "trm_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserMistake(f"{name}={value}: must be above 0 and below 1 (2e-4 is usual)")
        check_range(0, 1, warmup_fraction=self.warmup_fraction)
        check_range(0, weight_decay=self.weight_decay)
        check_choices(self, optimizer=("adamw", "adamw_8bit"))
        if self.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
            raise UserMistake("optimizer='adamw_8bit' needs bitsandbytes: pip install bitsandbytes, or choose 'adamw'")

    @property
    def reasoner_learning_rate(self) -> float:
        """Peak learning rate of the reasoner, which starts from nothing; the adapter starts from a trained model."""
        return self.trm_learning_rate or 5 * self.learning_rate


def build_optimizer(
    *, base: Iterable[nn.Parameter], reasoner: Reasoner | None, settings: OptimizerSettings
) -> torch.optim.AdamW:
    """AdamW over everything trainable, in groups by learning rate and weight decay."""
    parts = [ParameterGroup("lora", list(base), settings.learning_rate)]
    if reasoner is not None:
        parts += reasoner.parameter_groups(settings.reasoner_learning_rate)
    groups = []
    for name, part, learning_rate in parts:
        for suffix, decay in (("", settings.weight_decay), ("_no_decay", 0.0)):  # matrices, and all else
            found = [one for one in part if one.requires_grad and (one.ndim >= 2) is (suffix == "")]
            if found:
                groups.append({"params": found, "lr": learning_rate, "weight_decay": decay, "name": name + suffix})
    if not groups:
        raise UserMistake("nothing to train: the base is frozen and nothing of a reasoner is trained either")
    if settings.optimizer == "adamw_8bit":
        return import_module("bitsandbytes").optim.AdamW8bit(groups, betas=BETAS)
    return torch.optim.AdamW(groups, betas=BETAS)


def build_schedule(
    optimizer: torch.optim.Optimizer, *, total_steps: int, settings: OptimizerSettings, begins_at: int = 0
) -> LambdaLR:
    """Warm-up then cosine, stepped once per optimizer step; of a run that goes on, over the steps behind its end."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    n_steps = total_steps - begins_at
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=settings.warmup_fraction * n_steps + 1,
        num_training_steps=n_steps + 1,
        min_lr_rate=0.05,
        last_epoch=0,  # one step on: the very first step is to move the weights too
    )
    if begins_at:
        schedule.lr_lambdas = [lambda step, share=one: share(step - begins_at) for one in schedule.lr_lambdas]
    return schedule

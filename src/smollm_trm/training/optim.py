"""What moves the weights: AdamW with a learning rate of its own for the reasoner, warm-up then cosine."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_with_min_lr_schedule_with_warmup


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4
    """Peak learning rate of the LoRA adapter (of all base weights, where those are trained)."""
    trm_learning_rate: float | None = None
    """Peak learning rate of the reasoner; None takes five times `learning_rate`. The recursion's network, called many
    times per step, gets this divided by its calls with gradient."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages of the gradient and its square."""
    warmup_fraction: float = 0.1
    """Share of the run's optimizer steps in which the learning rate climbs to its peak."""
    final_fraction: float = 0.05
    """The learning rate at the end of the cosine, as a share of the peak."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "trm_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}={value}: must be above 0 and below 1 (2e-4 is usual)")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay={self.weight_decay}: must be 0 or more")

    @property
    def reasoner_learning_rate(self) -> float:
        """Peak learning rate of the reasoner, which starts from nothing; the adapter starts from a trained model."""
        return self.trm_learning_rate or 5 * self.learning_rate


def reasoner_learning_rates(reasoner: nn.Module, learning_rate: float) -> list[tuple[str, list[nn.Parameter], float]]:
    """A reasoner's parameters as `(name, parameters, learning rate)`: a recursion's is divided by its calls.

    Adam's step does not shrink with the gradient, so a network that is applied n + 1 times with the same weights moves
    the answer n + 1 times as far; at the full learning rate it learns to say the same to every problem.
    """
    recursion = getattr(reasoner, "recursion", None)
    if recursion is None:
        return [("trm", list(reasoner.parameters()), learning_rate)]
    tied = list(recursion.parameters())
    others = [one for one in reasoner.parameters() if all(one is not other for other in tied)]
    return [("trm", others, learning_rate), ("recursion", tied, learning_rate / recursion.calls_with_gradient)]


def build_optimizer(*, base: nn.Module, reasoner: nn.Module | None, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over everything trainable, in groups by learning rate and weight decay.

    Args:
        base: its trainable parameters get `learning_rate`.
        reasoner: its parameters get `reasoner_learning_rates`; None for the baseline.
        settings: learning rates, decay and betas.

    Raises:
        ValueError: nothing is trainable.
    """
    groups = []
    parts = [("lora", list(base.parameters()), settings.learning_rate)]
    if reasoner is not None:
        parts += reasoner_learning_rates(reasoner, settings.reasoner_learning_rate)
    for name, part, learning_rate in parts:
        trainable = [parameter for parameter in part if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
        others = [parameter for parameter in trainable if parameter.ndim < 2]
        for suffix, parameters, decay in (("", matrices, settings.weight_decay), ("_no_decay", others, 0.0)):
            if parameters:
                group = {"params": parameters, "lr": learning_rate, "weight_decay": decay, "name": name + suffix}
                groups.append(group)
    if not groups:
        raise ValueError("nothing to train: the base is frozen and there is no reasoner; set base_training or use_trm")
    return torch.optim.AdamW(groups, betas=settings.betas)


def build_schedule(optimizer: torch.optim.Optimizer, *, total_steps: int, settings: OptimizerSettings) -> LambdaLR:
    """Warm-up then cosine, stepped once per optimizer step.

    Args:
        optimizer: its groups hold their peak learning rates.
        total_steps: optimizer steps of the whole run.
        settings: warm-up and final share.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        num_warmup_steps=settings.warmup_fraction * total_steps + 1,
        num_training_steps=total_steps + 1,
        min_lr_rate=settings.final_fraction,
        last_epoch=0,  # one step on: the very first step is to move the weights too
    )

"""What moves the weights: AdamW with a rate of its own for the reasoner, warm-up then cosine."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    learning_rate: float = 2e-4
    """Peak rate of the LoRA adapter (of all base weights, where those are trained)."""
    trm_learning_rate: float | None = None
    """Peak rate of the reasoner; None takes five times `learning_rate`. The recursion's network, called many times per
    step, gets this divided by its calls with gradient."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages of the gradient and its square."""
    warmup_fraction: float = 0.1
    """Share of the run's optimizer steps in which the rate climbs to its peak."""
    final_fraction: float = 0.05
    """The rate at the end of the cosine, as a share of the peak."""

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
    def reasoner_rate(self) -> float:
        """Peak rate of the reasoner, which starts from nothing; the adapter starts from a trained model."""
        return self.trm_learning_rate or 5 * self.learning_rate


def schedule_factor(step: int, *, total_steps: int, settings: OptimizerSettings) -> float:
    """The rate at an optimizer step as a share of its peak.

    Args:
        step: optimizer steps made so far.
        total_steps: optimizer steps of the whole run.
        settings: warm-up and final share.
    """
    warmup = settings.warmup_fraction * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    return settings.final_fraction + (1 - settings.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def reasoner_rates(reasoner: nn.Module, rate: float) -> list[tuple[str, list[nn.Parameter], float]]:
    """A reasoner's parameters as `(name, parameters, rate)`: a recursion among them gets the rate divided by its calls.

    Adam's step does not shrink with the gradient, so a network that is applied n + 1 times with the same weights moves
    the answer n + 1 times as far; at the full rate it learns to say the same to every problem.
    """
    recursion = getattr(reasoner, "recursion", None)
    if recursion is None:
        return [("trm", list(reasoner.parameters()), rate)]
    tied = list(recursion.parameters())
    others = [one for one in reasoner.parameters() if all(one is not other for other in tied)]
    return [("trm", others, rate), ("recursion", tied, rate / recursion.calls_with_gradient)]


def build_optimizer(*, base: nn.Module, reasoner: nn.Module | None, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over everything trainable, in groups by rate and weight decay.

    Args:
        base: its trainable parameters get `learning_rate`.
        reasoner: its parameters get `reasoner_rate`, see `reasoner_rates`; None for the baseline.
        settings: rates, decay and betas.
    """
    groups = []
    parts = [("lora", list(base.parameters()), settings.learning_rate)]
    if reasoner is not None:
        parts += reasoner_rates(reasoner, settings.reasoner_rate)
    for name, part, rate in parts:
        trainable = [parameter for parameter in part if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
        others = [parameter for parameter in trainable if parameter.ndim < 2]
        for suffix, parameters, decay in (("", matrices, settings.weight_decay), ("_no_decay", others, 0.0)):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay, "name": name + suffix})
    if not groups:
        raise ValueError("nothing to train: the base is frozen and there is no reasoner; set base_training or use_trm")
    return torch.optim.AdamW(groups, betas=settings.betas)


def build_schedule(optimizer: torch.optim.Optimizer, *, total_steps: int, settings: OptimizerSettings) -> LambdaLR:
    """`schedule_factor` as a scheduler that is stepped once per optimizer step."""
    return LambdaLR(optimizer, lambda step: schedule_factor(step, total_steps=total_steps, settings=settings))

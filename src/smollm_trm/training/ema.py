"""An exponential moving average of the trainable weights, and its use.

Only what is trained is averaged: the frozen base would double its memory for nothing. The decay grows with the number
of steps, `min(limit, (1 + t) / (10 + t))`, because a fixed 0.999 still holds 88% of the initial weights after 125
steps. The averaged weights are what is validated, saved for use and evaluated.
"""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from smollm_trm.records import UserMistake


class TrainableAverage:
    """The average itself, in fp32, on the device of each parameter."""

    def __init__(self, module: nn.Module, *, limit: float = 0.999) -> None:
        if not 0 <= limit < 1:
            raise UserMistake(f"ema_decay={limit}: must be at least 0 and below 1")
        self.limit = limit
        self.steps = 0
        self.averages = {
            name: parameter.detach().clone() for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the weights; call once per optimizer step."""
        decay = min(self.limit, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_(
            list(self.averages.values()),
            [parameters[name].detach() for name in self.averages],
            1 - decay,
        )

    @torch.no_grad()
    def swap_in(self, module: nn.Module) -> None:
        """Put the average into the module and keep its raw weights aside."""
        parameters = dict(module.named_parameters())
        self.kept = {name: parameters[name].detach().clone() for name in self.averages}
        self.copy_to(module)

    @torch.no_grad()
    def swap_out(self, module: nn.Module) -> None:
        """Put the raw weights back."""
        parameters = dict(module.named_parameters())
        for name, raw in self.kept.items():
            parameters[name].copy_(raw)
        self.kept = {}

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's trainable weights with the average."""
        parameters = dict(module.named_parameters())
        for name, average in self.averages.items():
            parameters[name].copy_(average)


class AverageWeights(Callback):
    """Keeps a `TrainableAverage` during training and validates with it."""

    def __init__(self, *, limit: float = 0.999) -> None:
        self.limit = limit
        self.average: TrainableAverage | None = None
        self.loaded: dict[str, Any] | None = None
        self.last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, or from the checkpoint."""
        self.average = TrainableAverage(pl_module, limit=self.limit)
        if self.loaded is not None:
            self.average.steps = self.loaded["steps"]
            for name, average in self.average.averages.items():
                average.copy_(self.loaded["averages"][name])
            self.loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where a resumed run stands; when the fit starts Lightning does not know it yet."""
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update once per optimizer step, however many batches it accumulates."""
        if trainer.global_step != self.last_step:
            self.last_step = trainer.global_step
            self.average.update(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        if self.average is not None and trainer.state.fn == "fit":
            self.average.swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the raw weights."""
        if self.average is not None and self.average.kept:
            self.average.swap_out(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers for the checkpoint."""
        if self.average is None:
            return {}
        return {"steps": self.average.steps, "averages": self.average.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the average from a checkpoint; used when the fit starts."""
        self.loaded = state_dict or None

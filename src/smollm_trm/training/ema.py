"""An exponential moving average of the trainable weights, and its use.

Only what is trained is averaged: the frozen base would double its memory for nothing. The decay grows with the number
of steps, `min(limit, (1 + t) / (10 + t))`, because a fixed 0.999 still holds 88% of the initial weights after 125
steps. The averaged weights are what is validated, saved for use and evaluated.
"""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn


class TrainableAverage:
    """The average itself, in fp32, on the device of each parameter."""

    def __init__(self, module: nn.Module, *, limit: float = 0.999) -> None:
        self.limit = limit
        self.steps = 0
        self.averages = {name: one.detach().clone() for name, one in module.named_parameters() if one.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the weights; call once per optimizer step."""
        decay = min(self.limit, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        weights = [one.detach() for name, one in module.named_parameters() if name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    def swap(self, module: nn.Module) -> None:
        """Exchange the average and the module's weights; done twice, all is as before."""
        for name, parameter in module.named_parameters():
            if name in self.averages:
                parameter.data, self.averages[name] = self.averages[name], parameter.data


class AverageWeights(Callback):
    """Keeps a `TrainableAverage` during training and validates with it."""

    def __init__(self, *, limit: float = 0.999) -> None:
        self.limit = limit
        self.average: TrainableAverage | None = None
        self.loaded: dict[str, Any] = {}
        self.last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, or from the checkpoint."""
        self.average = TrainableAverage(pl_module, limit=self.limit)
        self.average.steps = self.loaded.get("steps", 0)
        for name, average in self.loaded.pop("averages", {}).items():
            self.average.averages[name].copy_(average)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where a resumed run stands; when the fit starts Lightning does not know it yet."""
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update once per optimizer step, however many batches it accumulates."""
        if trainer.global_step != self.last_step:
            self.last_step = trainer.global_step
            self.average.update(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average, and train on with the raw weights."""
        if trainer.state.fn == "fit":
            self.average.swap(pl_module)

    on_validation_end = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers for the checkpoint."""
        return {} if self.average is None else {"steps": self.average.steps, "averages": self.average.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the average from a checkpoint; used when the fit starts."""
        self.loaded = dict(state_dict)

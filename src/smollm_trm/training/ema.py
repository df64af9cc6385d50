"""An exponential moving average of the trainable weights, and its use.

Only what is trained is averaged: the frozen base would double its memory for nothing. The decay grows with the number
of steps, `min(limit, (1 + t) / (10 + t))`, because a fixed 0.999 still holds 88% of the initial weights after 125
steps. The averaged weights are what is validated, saved for use and evaluated.
"""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class AverageWeights(Callback):
    """Keeps the average, in fp32 and on the device of each weight, and validates with it."""

    def __init__(self, *, limit: float = 0.999) -> None:
        self.limit = limit
        self.steps = self.last_step = 0
        self.averages: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, named = self.averages, pl_module.named_parameters()
        self.averages = {name: one.detach().clone() for name, one in named if one.requires_grad}
        for name, average in loaded.items():
            self.averages[name].copy_(average)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where a resumed run stands; when the fit starts Lightning does not know it yet."""
        self.last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move the average towards the weights, once for every optimizer step since; many batches may make one step,
        and a batch several."""
        decay = 1.0
        for step in range(self.last_step, trainer.global_step):
            decay *= min(self.limit, (1 + self.steps) / (10 + self.steps))
            self.steps, self.last_step = self.steps + 1, step + 1
        if decay < 1:
            weights = [one.detach() for name, one in pl_module.named_parameters() if name in self.averages]
            torch._foreach_lerp_(list(self.averages.values()), weights, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average, and train on with the raw weights."""
        if trainer.state.fn == "fit":
            self.swap(pl_module)

    on_validation_end = on_validation_start

    def swap(self, pl_module: torch.nn.Module) -> None:
        """Exchange the average and the module's weights; done twice, all is as before."""
        for name, parameter in pl_module.named_parameters():
            if name in self.averages:
                parameter.data, self.averages[name] = self.averages[name], parameter.data

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.averages = state_dict["steps"], dict(state_dict["averages"])  # used when the fit starts

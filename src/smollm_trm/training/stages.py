"""A curriculum in a run: rows, model and figures enter a stage when its first epoch begins."""

import logging
import math
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from smollm_trm.data.curriculum import ALL_STEPS, Curriculum
from smollm_trm.records import UserMistake
from smollm_trm.training.checkpoints import BestAndLatest

stages_log = logging.getLogger("smollm_trm.training.stages")


class Stages(Callback):
    """Keeps data module and model in the stage of the epoch; the best checkpoint is the best of the newest stage."""

    def __init__(self, *, reset_optimizer: bool = False) -> None:
        self.reset_optimizer = reset_optimizer
        self.stage: int | None = None
        self.plan: dict[str, Any] = {}
        self.loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "plan": self.plan}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stage, self.loaded = state_dict["stage"], state_dict["plan"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a checkpoint of another plan; a run that has ended stays in its last stage."""
        self.plan = asdict(trainer.datamodule.curriculum)
        for name, now in self.plan.items():
            if self.loaded and self.loaded[name] != now:
                told = f"the checkpoint belongs to a curriculum with {name}={self.loaded[name]!r}, now it is {now!r}"
                raise UserMistake(f"{told}: set it back, or choose another output_dir")
        if self.stage is not None:
            show_stage(pl_module, trainer.datamodule.curriculum, self.stage)

    def enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's rows; where its stage is a new one, let the model and what is kept of the run know."""
        stage = trainer.datamodule.enter_epoch(trainer.current_epoch)
        if stage == self.stage:
            return
        show_stage(pl_module, trainer.datamodule.curriculum, stage)
        if self.stage is not None:
            for part in trainer.callbacks:
                if isinstance(part, BestAndLatest):  # losses of other rows cannot be compared
                    part.best_step, part.best_loss = 0, math.inf
            if self.reset_optimizer:
                for optimizer in trainer.optimizers:
                    optimizer.state = defaultdict(dict)
        self.stage = stage

    on_train_start = on_train_epoch_start = enter

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.log("stage", float(self.stage))


def show_stage(pl_module: LightningModule, curriculum: Curriculum, stage: int) -> None:
    """Let the model ask and write as a stage does, and say so."""
    skip_steps, n_slots = curriculum.plan(stage)
    target = {"target": "answer"} if skip_steps == ALL_STEPS else {"target": "steps", "skip_steps": skip_steps}
    pl_module.model.write_prompts(num_slots=n_slots if curriculum.has_latents else None, **target)
    told = "stage %d: %s steps are left out, %d latents stand in their place"
    stages_log.info(told, stage, "all" if skip_steps == ALL_STEPS else skip_steps, n_slots)

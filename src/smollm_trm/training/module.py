"""The LightningModule: one drawn supervision step per batch, one loss, one backward.

A supervised pass of the base at every supervision step would make a training step several times as slow. Drawing one
step k per batch is unbiased for the mean over steps: the steps before k run without gradient, memory stays constant,
and Lightning's automatic optimization, accumulation and clipping work as they are.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor

from smollm_trm.data.batching import IGNORED_LABEL
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.models.output import ReasoningOutput, token_losses
from smollm_trm.models.reasoners import Thought
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.span import latent_variation
from smollm_trm.records import run_record, write_json
from smollm_trm.training.optim import OptimizerSettings, build_optimizer, build_schedule

HALTING_WEIGHT = 0.5
HALTING_TOLERANCE = 1.01
HALTING_EVERY = 16


def rows_all_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows have the right token at every supervised position, `(B,)` of bool.

    Args:
        logits: `(B, K, V)`.
        labels: `(B, K)`, -100 where nothing is supervised.
    """
    return ((logits.argmax(-1) == labels) | (labels == IGNORED_LABEL)).all(1)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each row's supervised tokens, `(B,)`."""
    return token_losses(logits, labels).sum(1) / (labels != IGNORED_LABEL).sum(1).clamp_min(1)


def halting_losses(logit: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each row, `(B,)`: should it have stopped at this step?

    Args:
        logit: `(B,)`.
        target: `(B,)` of bool.
    """
    return F.binary_cross_entropy_with_logits(logit.float(), target.float(), reduction="none")


class SmolLMTRMLightningModule(LightningModule):
    """Trains a `SmolLMv3WithTRM`.

    Args:
        model: base, adapter and reasoner.
        optimizer_settings: rates and schedule.
        supervise: "one" draws a supervision step per batch; "all" makes a pass of the base per step.
        seed: of everything random in a step; a step's randomness depends on it and on the step's number only.
        max_new_tokens: limit of the answers in `trainer.test`; None makes room for the longest gold solution.
    """

    def __init__(
        self,
        *,
        model: SmolLMv3WithTRM,
        optimizer_settings: OptimizerSettings | None = None,
        supervise: str = "one",
        seed: int = 0,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if supervise not in ("one", "all"):
            raise ValueError(f"supervise={supervise!r}: choose 'one' or 'all'")
        self.model = model
        self.optimizer_settings = optimizer_settings or OptimizerSettings()
        self.supervise = supervise
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.strict_loading = False  # checkpoints leave the frozen base out

    def forward(self, *args, **kwargs) -> ReasoningOutput:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Make the step's randomness a function of seed, step and rank: a resumed run repeats an unbroken one."""
        step = self.current_epoch * 1_000_000 + batch_idx
        self.step_generator = torch.Generator().manual_seed(self.seed * 7_919 + step)  # the same on every rank
        torch.manual_seed((self.seed * 7_919 + step) * 1_009 + self.global_rank)

    def draw_step(self) -> int | None:
        """The supervision step that this batch trains, 1 to all; None for a reasoner that has only one."""
        if self.model.reasoner is None or self.model.reasoner.n_supervision_steps == 1:
            return None
        return int(torch.randint(1, self.model.reasoner.n_supervision_steps + 1, (), generator=self.step_generator))

    def global_mean(self, values: Tensor, counted: Tensor) -> Tensor:
        """The mean over all processes' batches of the values that count, as this process's part of the loss.

        Gradients are averaged over processes, so the sum is multiplied by their number: two processes then give the
        gradient of one with both batches.

        Args:
            values: of any shape.
            counted: of the same shape, True where a value counts.
        """
        count, world = counted.sum(), self.trainer.world_size
        if world > 1:
            count = self.all_gather(count).sum()
        return values.masked_fill(~counted, 0).sum() * world / count.clamp_min(1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One drawn supervision step, or all of them."""
        step = None
        if self.supervise == "all" and self.model.reasoner is not None:
            thoughts = self.model.think(batch["input_ids"], batch["attention_mask"], gradient_at_every_step=True)
        else:
            step = self.draw_step()
            thoughts = self.model.think(batch["input_ids"], batch["attention_mask"], n_steps=step)[-1:]
        has_head = bool(thoughts) and thoughts[0].halting_logit is not None and self.model.encoder.target == "steps"
        by_step = self.losses_by_step(batch) if has_head and batch_idx % HALTING_EVERY == 0 else None
        losses, halting = [], []
        for number, thought in enumerate(thoughts or [None], start=step or 1):
            output = self.model(**batch, thought=thought)
            supervised = output.labels != IGNORED_LABEL
            losses.append(self.global_mean(token_losses(output.logits, output.labels), supervised))
            halting.append(self.halting_part(output, number, by_step))
        loss = torch.stack(losses).mean()
        self.log("train_loss", loss.detach(), prog_bar=True, sync_dist=True)
        if thoughts and len(batch["input_ids"]) > 1:
            self.log("latent_variation", latent_variation(thoughts[-1].latents))
        return loss + sum(halting) / len(halting)

    def halting_part(self, output: ReasoningOutput, step: int, by_step: Tensor | None) -> Tensor | float:
        """The halting head's loss, where there is one.

        Under `target="answer"` a row should stop where all its answer tokens are right. Under `target="steps"` it
        should stop where its loss is within 1% of its best step's; that takes the other steps' losses, so it is
        trained on every 16th batch only.

        Args:
            output: of the supervision step in training.
            step: its number, from 1.
            by_step: see `losses_by_step`; None on the other batches.
        """
        if output.halting_logit is None:
            return 0.0
        if self.model.encoder.target == "answer":
            target = rows_all_right(output.logits.detach(), output.labels)
        elif by_step is not None:
            target = by_step[step - 1] <= HALTING_TOLERANCE * by_step.amin(0)
        else:
            return 0.0 * output.halting_logit.sum()  # so that the head has a gradient in every step, as DDP asks
        real = (output.labels != IGNORED_LABEL).any(1)
        return HALTING_WEIGHT * self.global_mean(halting_losses(output.halting_logit, target), real)

    @torch.no_grad()
    def losses_by_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Each row's loss after each supervision step, `(S, B)`, without dropout, whose noise is more than 1%."""

        def losses_after(thought: Thought) -> Tensor:  # its logits, the largest thing in memory, go as it returns
            output = self.model(**batch, thought=thought)
            return row_losses(output.logits, output.labels)

        self.model.eval()
        thoughts = self.model.think(batch["input_ids"], batch["attention_mask"])
        losses = [losses_after(thought) for thought in thoughts]
        self.model.train()
        return torch.stack(losses)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss per supervised token on the dev part, after all supervision steps."""
        output = self.model(**batch)
        count = int((output.labels != IGNORED_LABEL).sum())
        self.log_mean("dev_loss", output.loss, count)

    def log_mean(self, name: str, mean: Tensor | float, count: int) -> None:
        """Log the mean over an evaluation, of all processes.

        Lightning averages the counts of the processes as integers; as multiples of their number they stay exact.

        Args:
            name: of the figure.
            mean: over this batch.
            count: how much this batch weighs.
        """
        self.log(name, mean, batch_size=count * self.trainer.world_size, sync_dist=True, prog_bar=True)

    def test_step(self, rows: list[dict[str, str]], batch_idx: int) -> None:
        """Answer this process's share of the official test problems; `evaluation/` in the run's folder keeps it."""
        share = self.global_rank + batch_idx * self.trainer.world_size
        path = Path(self.trainer.default_root_dir) / "evaluation" / f"trainer_test{f'_{share}' if share else ''}.jsonl"
        data = self.trainer.datamodule
        size, split = (32, None) if data is None else (data.eval_batch_size, data.splits.summary)
        with torch.autocast(self.device.type, enabled=False):  # as elsewhere
            result = evaluate_gsm8k(
                self.model, rows, batch_size=size, max_new_tokens=self.max_new_tokens, predictions_path=path
            )
        write_json(path.with_suffix(".json"), {"part": "test", "split": split, **result, **run_record()})
        self.log_mean("test_accuracy", result["accuracy"], len(rows))

    def configure_optimizers(self) -> dict:
        """AdamW, and its schedule stepped once per optimizer step."""
        settings = self.optimizer_settings
        optimizer = build_optimizer(base=self.model.base_model, reasoner=self.model.reasoner, settings=settings)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = build_schedule(optimizer, total_steps=total, settings=settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leave the frozen base out."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        reasoner = {name for name in checkpoint["state_dict"] if name.startswith("model.reasoner.")}
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name in trainable | reasoner
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Refuse a checkpoint of another model."""
        found = checkpoint["state_dict"]
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if name not in found:
                raise ValueError(f"the checkpoint has no {name}: it was made by another configuration")
            if found[name].shape != parameter.shape:
                raise ValueError(
                    f"the checkpoint's {name} has shape {tuple(found[name].shape)}, this model's has "
                    f"{tuple(parameter.shape)}: it was made by another configuration"
                )

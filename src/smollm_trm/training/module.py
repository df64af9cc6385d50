"""The LightningModule: one drawn supervision step, one loss, one backward.

TRM supervises after each of its N steps; a pass of the base for each would make training several times as slow. One
step k, drawn for each optimizer step, is unbiased for their mean: the steps before k run without gradient, memory
stays constant, and Lightning's automatic optimization, accumulation and clipping work as they are.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor

from smollm_trm.data.batching import IGNORED_LABEL, supervised_columns
from smollm_trm.models.configuration import refuse_other_tensors
from smollm_trm.models.modeling import LatentCausalLMOutput
from smollm_trm.models.reasoners.reasoner import Thought
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake, check_choices
from smollm_trm.training.optim import OptimizerSettings, build_optimizer, build_schedule

HALTING_WEIGHT = 0.5
HALTING_TOLERANCE = 1.01
HALTING_EVERY = 16


def predicted_and_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `(B, K - 1, V)` beside the labels `(B, K - 1)` that they predict."""
    return logits[:, :-1], labels[:, labels.shape[1] - logits.shape[1] + 1 :]


def rows_all_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows have the right token at every supervised position, `(B,)` of bool; see `predicted_and_labels`."""
    return ((logits.argmax(-1) == labels) | (labels == IGNORED_LABEL)).all(1)


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each row's supervised tokens in nats, `(B,)`; see `predicted_and_labels`."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view_as(labels).sum(1) / (labels != IGNORED_LABEL).sum(1).clamp_min(1)


def halting_losses(logit: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each row, `(B,)`: should it have stopped at this step?"""
    return F.binary_cross_entropy_with_logits(logit.float(), target.float(), reduction="none")


class SmolLMTRMLightningModule(LightningModule):
    """Trains a `SmolLMv3WithTRM`.

    Args:
        model: base, adapter and reasoner.
        optimizer_settings: learning rates and schedule.
        supervise: "one" draws a supervision step; "all" makes a pass of the base for each.
        seed: of everything random in a step; a step's randomness depends on it and on the step's number only.
        fitted_on: training questions on which a fresh reasoner measures the statistics it keeps.
        begins_at: step at which the learning rates begin their course; above 0 in a run whose `max_steps` was raised.
        answer_test: what `trainer.test` does with a list of official test problems; returns its accuracy.
    """

    def __init__(
        self,
        *,
        model: SmolLMv3WithTRM,
        optimizer_settings: OptimizerSettings | None = None,
        supervise: str = "one",
        seed: int = 0,
        fitted_on: Sequence[str] = (),
        begins_at: int = 0,
        answer_test: Callable[[LightningModule, Sequence[dict[str, str]], int], float] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.supervise, self.seed = model, supervise, seed
        self.optimizer_settings = optimizer_settings or OptimizerSettings()
        check_choices(self, supervise=("one", "all"))
        self.fitted_on, self.begins_at, self.answer_test = fitted_on, begins_at, answer_test
        self.strict_loading = False  # checkpoints leave the frozen base out

    def on_fit_start(self) -> None:
        """Measure a fresh reasoner's statistics, on the device: on a CPU a base in half precision takes minutes."""
        if self.fitted_on and self.trainer.ckpt_path is None:
            self.model.fit_reasoner(self.fitted_on)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Make a step's randomness a function of seed, step and rank: a resumed run repeats an unbroken one."""
        # The accumulated batches of a step, and all processes, draw one supervision step; dropout is each one's own.
        first = self.seed * 7_919 + self.current_epoch * 1_000_000
        self.step_generator = torch.Generator().manual_seed(first + batch_idx // self.trainer.accumulate_grad_batches)
        torch.manual_seed((first + batch_idx) * 1_009 + self.global_rank)

    def draw_step(self) -> int | None:
        """The supervision step that this batch trains, 1 to all; None for a reasoner that has only one."""
        n_steps = 1 if self.model.reasoner is None else self.model.reasoner.n_supervision_steps
        return None if n_steps == 1 else int(torch.randint(1, n_steps + 1, (), generator=self.step_generator))

    def step_totals(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        """What a batch's sums over tokens and over rows are divided by: its part of what the optimizer step has."""
        if "num_items_in_batch" not in batch:  # where the loader does not say it, every batch counts the same
            return max(1, int((batch["labels"] != IGNORED_LABEL).sum())), len(batch["labels"])
        averaged = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return batch["num_items_in_batch"] / averaged, batch["num_examples_in_batch"] / averaged

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss after one drawn supervision step, or the mean over all of them, and the halting head's."""
        n_tokens, n_rows = self.step_totals(batch)
        every = self.supervise == "all"
        options = {"n_steps": None if every else self.draw_step(), "gradient_at_every_step": every}
        thoughts = self.model.think(batch["input_ids"], batch["attention_mask"], **options)
        supervised = list(enumerate(thoughts or [None], start=1))[0 if every else -1 :]
        has_head = bool(thoughts) and thoughts[0].halting_logit is not None
        compares = has_head and self.model.config.target == "steps" and self.trainer.global_step % HALTING_EVERY == 0
        by_step = self.losses_by_step(batch) if compares else None
        losses, halting, said = [], [], []  # of each supervised step
        for number, thought in supervised:
            output = self.answer_from(batch, thought, num_items_in_batch=n_tokens)
            losses.append(output.loss)
            if thought is not None and "latent_labels" in batch:
                said.append(self.latent_loss(thought, batch["latent_labels"]) / n_tokens)
            if has_head:
                halting.append(self.halting_part(thought, output.logits.detach(), batch["labels"], number, by_step))
        loss = torch.stack(losses).mean()
        self.log_training(loss.detach() * n_tokens, batch, thoughts)
        loss = loss + torch.stack(said).mean() if said else loss
        return loss + HALTING_WEIGHT * torch.stack(halting).mean() / n_rows if halting else loss

    def answer_from(self, batch: dict[str, Tensor], thought: Thought | None, **options) -> LatentCausalLMOutput:
        """One pass over a batch with latents made before; logits where labels are."""
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        if thought is not None:
            given["thought"] = thought
        given["logits_to_keep"] = supervised_columns(batch["labels"])
        return self.model(**given, use_cache=False, **options)

    def latent_loss(self, thought: Thought, labels: Tensor) -> Tensor:
        """Summed loss of what a thought's M latents say against `(B, M)`, the results of the steps they stand for."""
        asked = labels != IGNORED_LABEL
        latents = thought.latents if thought.free is None else thought.free
        logits = self.model.reasoner.words(latents[asked], self.model.lm_head) if bool(asked.any()) else None
        if logits is None:
            return 0.0 * latents.sum()
        self.log("latent_accuracy", (logits.argmax(-1) == labels[asked]).float().mean())
        return F.cross_entropy(logits.float(), labels[asked], reduction="sum")

    def log_training(self, loss_sum: Tensor, batch: dict[str, Tensor], thoughts: list[Thought]) -> None:
        """The mean loss per supervised token of this batch, over all processes, and what the reasoner has to say."""
        count = (batch["labels"] != IGNORED_LABEL).sum()
        if self.trainer.world_size > 1:
            count = self.all_gather(count).sum()
        mean = loss_sum * self.trainer.world_size / count.clamp_min(1)
        self.log("train_loss", mean, prog_bar=True, sync_dist=True)
        if thoughts and len(batch["input_ids"]) > 1:
            for name, value in self.model.reasoner.logs(thoughts[-1]).items():
                self.log(name, value)

    def halting_part(
        self, thought: Thought, logits: Tensor, labels: Tensor, number: int, by_step: Tensor | None
    ) -> Tensor:
        """The halting head's loss over rows: are all answer tokens right, or the loss within 1% of the best step's?"""
        logits, expected = predicted_and_labels(logits, labels)
        if self.model.config.target == "answer":
            should_stop = rows_all_right(logits, expected)
        elif by_step is not None:
            should_stop = by_step[number - 1] <= HALTING_TOLERANCE * by_step.amin(0)
        else:
            return 0.0 * thought.halting_logit.sum()  # so that the head has a gradient in every step, as DDP asks
        real = (expected != IGNORED_LABEL).any(1)
        return halting_losses(thought.halting_logit, should_stop).masked_fill(~real, 0).sum()

    @torch.no_grad()
    def losses_by_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Each row's loss after each supervision step, `(S, B)`, without dropout, whose noise is more than 1%."""
        labels, losses = batch["labels"], []
        self.model.eval()
        for thought in self.model.think(batch["input_ids"], batch["attention_mask"]):  # one step's logits at a time
            losses.append(row_losses(*predicted_and_labels(self.answer_from(batch, thought).logits, labels)))
        self.model.train()
        return torch.stack(losses)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss per supervised token on the dev part, after all supervision steps."""
        output = self.answer_from(batch, None)
        self.log_mean("dev_loss", output.loss, int((batch["labels"] != IGNORED_LABEL).sum()))

    def log_mean(self, name: str, mean: Tensor | float, count: int) -> None:
        """Log the mean over an evaluation, of all processes; `count` is what this batch's mean weighs."""
        mean = mean if count else 0.0  # of nothing there is none
        # Lightning averages the processes' counts as integers: as multiples of their number they stay exact.
        self.log(name, mean, batch_size=count * self.trainer.world_size, sync_dist=True, prog_bar=True)

    def test_step(self, rows: list[dict[str, str]], batch_idx: int) -> None:
        if self.answer_test is None:
            raise UserMistake("trainer.test needs a module made by train_gsm8k, which knows how to answer")
        with torch.autocast(self.device.type, enabled=False):  # as elsewhere
            self.log_mean("test_accuracy", self.answer_test(self, rows, batch_idx), len(rows))

    def configure_optimizers(self) -> dict:
        settings, reasoner = self.optimizer_settings, self.model.reasoner
        base = [parameter for name, parameter in self.model.named_parameters() if ".reasoner." not in name]
        optimizer = build_optimizer(base=base, reasoner=reasoner, settings=settings)
        n_steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = build_schedule(optimizer, total_steps=n_steps, settings=settings, begins_at=self.begins_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: one for name, one in weights if name in kept or ".reasoner." in name}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Refuse a checkpoint of another model."""
        wanted = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        found = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name in wanted}
        refuse_other_tensors("the checkpoint was made by another configuration", found, wanted)

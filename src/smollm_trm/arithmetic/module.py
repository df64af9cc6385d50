"""The decoder under Lightning: loss, schedule, and what is measured while it trains.

Under teacher forcing a row counts as exact when every token of its completion is the model's first choice;
greedy decoding would then write exactly that completion, so validation knows exact match from one pass and
decodes nothing.
"""

import math
from functools import partial

import torch
from pytorch_lightning import LightningModule
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from smollm_trm.arithmetic.optimizer import build_sum_optimizer
from smollm_trm.arithmetic.settings import SumTrainingSettings


def weighted_next_token_loss(
    logits: torch.Tensor, input_ids: torch.Tensor, token_weights: torch.Tensor
) -> torch.Tensor:
    """Mean negative log-likelihood of the next token, weighted per token.

    Args:
        logits: [B, L, V]; position i says token i + 1.
        input_ids: int64 [B, L].
        token_weights: [B, L], weight of every token as a target, 0 for padding.
    """
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    weights = token_weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def warm_up_then_cosine(step: int, *, warmup_steps: int, num_steps: int) -> float:
    """Factor on the learning rate at a step (0 is the first): up in a line, down to 0 in a cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


class SumModule(LightningModule):
    """Train a causal LM on sums. Nothing in a step is drawn at random: a resumed run needs no random state.

    Args:
        model: the decoder.
        settings: optimizer, learning rate, weight decay and warm-up.
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, *, model: PreTrainedModel, settings: SumTrainingSettings, num_steps: int) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.num_steps = num_steps

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of a batch. No mask is needed: padding stands on the right and attention looks to the left."""
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = weighted_next_token_loss(logits, batch["input_ids"], batch["token_weights"])
        self.log("train_loss", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Loss, token accuracy and exact match of the completions, by teacher forcing."""
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        wanted = batch["is_completion"][:, 1:]
        right = logits[:, :-1].argmax(dim=-1) == batch["input_ids"][:, 1:]
        loss = weighted_next_token_loss(logits, batch["input_ids"], batch["is_completion"].float())
        num_tokens = int(wanted.sum())
        self.log("val_loss", loss, batch_size=num_tokens)
        self.log("val_token_accuracy", right[wanted].float().mean(), batch_size=num_tokens)
        exact = (right | ~wanted).all(dim=1).float().mean()
        self.log("val_exact_match", exact, batch_size=len(wanted))

    def configure_optimizers(self) -> dict:
        """The optimizer with warm-up and cosine, counted in optimizer steps."""
        settings = self.settings
        optimizer = build_sum_optimizer(
            self.model,
            optimizer=settings.optimizer,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        factor = partial(warm_up_then_cosine, warmup_steps=settings.warmup_steps, num_steps=self.num_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

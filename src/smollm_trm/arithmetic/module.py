"""The decoder under Lightning: loss, optimizer, schedule, and what is measured while it trains.

Under teacher forcing a row counts as exact when every token of its completion is the model's first choice;
greedy decoding would then write exactly that completion, so validation knows exact match from one pass and
decodes nothing.

Muon (Jordan et al. 2024; `torch.optim.Muon`) makes every update of a matrix orthogonal. On these sums a 2-layer
decoder reaches with it in 500 steps what takes AdamW 1,000, at 8% more time a step. Vectors and the embedding table are
no such matrices and stay with AdamW. Lightning's automatic optimization wants one optimizer: so one class steps both.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from smollm_trm.arithmetic.settings import SumTrainingSettings

ADAM_BETAS = (0.9, 0.98)


def weighted_next_token_loss(logits: Tensor, input_ids: Tensor, token_weights: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token; logits [B, L, V], input_ids [B, L], weights of targets [B, L]."""
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    weights = token_weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def warm_up_then_cosine(step: int, *, warmup_steps: int, num_steps: int) -> float:
    """Factor on the learning rate at a step (0 is the first): up in a line, down to 0 in a cosine."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


class MuonAndAdamW(Optimizer):
    """One optimizer to the outside: two parameter groups, one state, one checkpoint.

    Muon updates the `matrices`, AdamW the `others`; Muon's updates are brought to AdamW's size, so they share the rate.
    """

    def __init__(
        self, *, matrices: list[nn.Parameter], others: list[nn.Parameter], learning_rate: float, weight_decay: float
    ) -> None:
        self.parts: list[Optimizer] = [
            Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr=learning_rate, betas=ADAM_BETAS, weight_decay=weight_decay),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share_with_parts()

    def share_with_parts(self) -> None:
        """The parts work on this optimizer's groups and state: what a schedule or a checkpoint sets, they see."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a saved state, for both parts."""
        super().load_state_dict(state_dict)
        self.share_with_parts()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step both parts; the closure runs once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def build_sum_optimizer(model: nn.Module, *, optimizer: str, learning_rate: float, weight_decay: float) -> Optimizer:
    """The optimizer by name, "adamw" or "muon", at the schedule's peak learning rate."""
    parameters = list(model.parameters())
    if optimizer == "adamw":
        return AdamW(parameters, lr=learning_rate, betas=ADAM_BETAS, weight_decay=weight_decay)
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [weight for weight in parameters if weight.ndim == 2 and weight not in tables]
    others = [weight for weight in parameters if weight.ndim != 2 or weight in tables]
    return MuonAndAdamW(matrices=matrices, others=others, learning_rate=learning_rate, weight_decay=weight_decay)


class SumModule(LightningModule):
    """Train a causal LM on sums. Nothing in a step is drawn at random: a resumed run needs no random state."""

    def __init__(self, *, model: PreTrainedModel, settings: SumTrainingSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch. No mask is needed: padding stands on the right and attention looks to the left."""
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        loss = weighted_next_token_loss(logits, batch["input_ids"], batch["token_weights"])
        self.log("train_loss", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss, token accuracy and exact match of the completions, by teacher forcing."""
        logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        wanted = batch["is_completion"][:, 1:]
        right = logits[:, :-1].argmax(dim=-1) == batch["input_ids"][:, 1:]
        loss = weighted_next_token_loss(logits, batch["input_ids"], batch["is_completion"].float())
        num_tokens = int(wanted.sum())
        self.log("val_loss", loss, batch_size=num_tokens)
        self.log("val_token_accuracy", right[wanted].float().mean(), batch_size=num_tokens)
        self.log("val_exact_match", (right | ~wanted).all(dim=1).float().mean(), batch_size=len(wanted))

    def configure_optimizers(self) -> dict:
        """The optimizer with warm-up and cosine, counted in optimizer steps."""
        settings = self.settings
        optimizer = build_sum_optimizer(
            self.model,
            optimizer=settings.optimizer,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        factor = partial(warm_up_then_cosine, warmup_steps=settings.warmup_steps, num_steps=self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

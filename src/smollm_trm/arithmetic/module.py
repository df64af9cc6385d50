"""The decoder under Lightning: batches, loss, optimizer, schedule, and what is measured while it trains.

All examples stand in one byte tensor, and a batch is as long as its longest row, not 128.

Under teacher forcing a row counts as exact when every token of its completion is the model's first choice;
greedy decoding would then write exactly that completion, so validation decodes nothing.

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
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from smollm_trm.arithmetic.model import VOCABULARY, build_arithmetic_tokenizer
from smollm_trm.arithmetic.rules import THINK
from smollm_trm.arithmetic.settings import SumTrainingSettings
from smollm_trm.records import UserMistake

ADAM_BETAS = (0.9, 0.98)


class EncodedSums(Dataset):
    """Written sums as tokens; `sums[rows]` is a whole batch. One longer than `max_length` tokens is refused.

    `problem_weight` is the weight of the problem's own tokens in the loss. Learning them completes `7+` to a whole sum;
    but their digits are chance, so they are left out of what is reported as accuracy.
    """

    def __init__(self, lines: list[str], *, max_length: int, problem_weight: float = 0.0) -> None:
        encoded = build_arithmetic_tokenizer()(lines, padding=True, padding_side="right", return_tensors="pt")
        self.lengths = encoded["attention_mask"].sum(dim=1).tolist()
        if (most := max(self.lengths)) > max_length:
            longest = lines[self.lengths.index(most)]
            raise UserMistake(
                f"the example {longest!r} has {most} tokens, max_length is {max_length}: "
                "raise --max-length or make data of fewer digits"
            )
        is_equals = encoded["input_ids"] == VOCABULARY["="]
        self.problem_lengths = is_equals.int().argmax(dim=1) + 1  # up to and including the first `=`
        self.token_ids = encoded["input_ids"].to(torch.uint8)
        self.problem_weight = problem_weight

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch, padded right: input_ids int64, token_weights float, is_completion bool, all [B, L]."""
        chosen = torch.as_tensor(rows)
        lengths = torch.tensor([[self.lengths[row]] for row in rows])  # [B, 1]
        columns = torch.arange(int(lengths.max()))
        is_real = columns < lengths
        is_completion = is_real & (columns >= self.problem_lengths[chosen, None])
        return {
            "input_ids": self.token_ids[chosen, : len(columns)].long(),
            "token_weights": is_completion + self.problem_weight * (is_real & ~is_completion),
            "is_completion": is_completion,
        }


def repeat_one_column_sums(lines: list[str], times: int) -> list[str]:
    """Let the sums without a chain, of which there are few, be seen several times an epoch beside those with one."""
    if not any(THINK in line for line in lines):
        return lines
    return [line for line in lines for _ in range(1 if THINK in line else times)]


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

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], **options: float) -> None:
        self.parts: list[Optimizer] = [
            Muon(matrices, **options, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, **options, betas=ADAM_BETAS),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step both parts on this optimizer's groups and state, as a schedule or a checkpoint has set them."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
        muon, adamw = self.parts
        loss = muon.step(closure)
        adamw.step()
        return loss


def build_sum_optimizer(model: nn.Module, settings: SumTrainingSettings) -> Optimizer:
    """The optimizer by name, "adamw" or "muon", at the schedule's peak learning rate."""
    parameters = list(model.parameters())
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return AdamW(parameters, **options, betas=ADAM_BETAS)
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [weight for weight in parameters if weight.ndim == 2 and weight not in tables]
    others = [weight for weight in parameters if weight.ndim != 2 or weight in tables]
    return MuonAndAdamW(matrices, others, **options)


class SumModule(LightningModule):
    """Train a causal LM on sums. Nothing in a step is drawn at random: a resumed run needs no random state."""

    def __init__(self, *, model: PreTrainedModel, settings: SumTrainingSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # No mask is needed: padding stands on the right and attention looks to the left.
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
        optimizer, num_steps = build_sum_optimizer(self.model, self.settings), self.trainer.max_steps
        factor = partial(warm_up_then_cosine, warmup_steps=self.settings.warmup_steps, num_steps=num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

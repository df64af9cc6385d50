"""The settings of a training run, its defaults (the user's document) and the fast preset.

The fast preset is for two CPU cores: a decoder of 0.4M parameters, a high learning rate with a cosine over a
fixed number of steps. It reaches 99% exact match where the document's defaults are still at their start.
"""

from dataclasses import dataclass
from typing import Any

from smollm_trm.arithmetic.model import ARITHMETIC_SIZES
from smollm_trm.arithmetic.optimizer import SUM_OPTIMIZERS

FAST_PRESET = {
    "model_size": "tiny",
    "batch_size": 64,
    "eval_batch_size": 256,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "warmup_steps": 100,
    "max_steps": 2000,
    "problem_weight": 0.1,
    "one_column_repeats": 20,
    "num_workers": 0,
    "save_steps": 500,
    "eval_steps": 250,
    "eval_examples": 1000,
    "logging_steps": 50,
}
ARITHMETIC_PRESETS = {"fast": FAST_PRESET}
FREE_ON_RESUME = (
    *("data_dir", "output_dir", "num_workers", "save_steps", "eval_steps", "logging_steps"),
    *("no_wandb", "eval_batch_size", "eval_examples", "resume", "command", "versions", "machine"),
)
AT_LEAST_ONE = (
    *("max_length", "batch_size", "eval_batch_size", "num_epochs", "one_column_repeats"),
    *("save_steps", "eval_steps", "logging_steps"),
)


@dataclass(frozen=True, kw_only=True)
class SumTrainingSettings:
    """How a decoder is trained on sums."""

    model_size: str = "small"
    """A row of the table of sizes."""
    max_length: int = 128
    """Tokens of the model's context."""
    batch_size: int = 32
    """Examples of an optimizer step."""
    eval_batch_size: int = 64
    """Examples of a batch in validation and test."""
    optimizer: str = "adamw"
    """"adamw", or "muon" for the blocks' matrices with adamw for the rest."""
    learning_rate: float = 1e-4
    """Peak of the schedule."""
    weight_decay: float = 0.01
    """Decoupled, as in AdamW."""
    num_epochs: int = 10
    """Passes over the training part."""
    max_steps: int = -1
    """Optimizer steps; -1 leaves it to num_epochs."""
    warmup_steps: int = 500
    """Steps of the linear rise, before the cosine."""
    problem_weight: float = 1.0
    """Weight of the problem's own tokens in the loss (they are chance)."""
    one_column_repeats: int = 1
    """How often an epoch shows a sum of one column, where the others have a chain."""
    data_dir: str = "data"
    """Folder of train.json, val.json and test.json."""
    output_dir: str = "checkpoints"
    """Where everything is written."""
    resume: str = "auto"
    """"auto" goes on with a run found there, "never" starts anew; or a checkpoint file."""
    num_workers: int = 4
    """Processes that prepare batches; never more than there are cores."""
    save_steps: int = 1000
    """Steps between checkpoints."""
    eval_steps: int = 1000
    """Steps between validations."""
    eval_examples: int = -1
    """Validation examples, the first of the part; -1 takes all."""
    logging_steps: int = 100
    """Steps between lines of the log."""
    fp16: bool = False
    """Mixed precision (GPU only)."""
    no_wandb: bool = False
    """No Weights & Biases, even where there is a key."""
    seed: int = 42
    """Fixes the first weights and the order of the batches."""

    def __post_init__(self) -> None:
        if self.model_size not in ARITHMETIC_SIZES:
            raise ValueError(f"model_size is {self.model_size!r}, but must be one of {', '.join(ARITHMETIC_SIZES)}")
        if self.optimizer not in SUM_OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}, but must be one of {', '.join(SUM_OPTIMIZERS)}")
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("weight_decay", "warmup_steps", "problem_weight", "num_workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be above 0")
        for name, otherwise in (("max_steps", "to go by num_epochs"), ("eval_examples", "to take all")):
            if getattr(self, name) != -1 and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1, or -1 {otherwise}")

    def count_steps(self, num_examples: int) -> int:
        """Optimizer steps of the whole run on so many training examples."""
        steps_per_epoch = -(-num_examples // self.batch_size)
        return self.max_steps if self.max_steps != -1 else self.num_epochs * steps_per_epoch


def apply_preset(preset: str | None, given: dict[str, Any]) -> SumTrainingSettings:
    """The settings given by hand, then the preset's, then the document's defaults.

    Args:
        preset: its name; None for none.
        given: what was set by hand, by name.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in (None, *ARITHMETIC_PRESETS):
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(ARITHMETIC_PRESETS)}")
    return SumTrainingSettings(**{**ARITHMETIC_PRESETS.get(preset, {}), **given})

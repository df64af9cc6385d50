"""Every setting of a data set and of a training run, checked before anything is computed.

The defaults are those of the user's document. The fast preset, for two CPU cores, reaches 99% exact match where they
are still at their start.
"""

from dataclasses import dataclass

from smollm_trm.arithmetic.rules import DIGIT_ORDERS, longest_example
from smollm_trm.records import UserMistake, check_choices, check_folder, check_range, picked

DECODER_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
ARITHMETIC_SIZES = {
    "tiny": (2, 128, 4, 512),
    "small": (4, 256, 4, 512),
    "medium": (6, 512, 8, 1024),
    "large": (8, 512, 8, 2048),
}
SUM_OPTIMIZERS = ("adamw", "muon")
PRESET_OPTIONS = {  # the document's default, the fast preset's
    "model_size": ("small", "tiny"),
    "batch_size": (32, 64),
    "eval_batch_size": (64, 256),
    "optimizer": ("adamw", "muon"),
    "learning_rate": (1e-4, 3e-3),
    "warmup_steps": (500, 100),
    "max_steps": (-1, 2000),
    "problem_weight": (1.0, 0.1),
    "one_column_repeats": (1, 20),
    "num_workers": (4, 0),
    "save_steps": (1000, 500),
    "eval_steps": (1000, 250),
    "eval_examples": (-1, 1000),
    "logging_steps": (100, 50),
}


@dataclass(frozen=True, kw_only=True)
class SumSettings:
    """Sums as train.json, val.json and test.json, no problem in two of them in any order of its operands."""

    num_examples: int = 100_000
    """Different problems in all three parts together."""
    max_digits: int = 2
    """Digits of the longest operand."""
    max_operands: int = 3
    """Numbers to add, at most; two at least."""
    chain: bool = True
    """Write the columns between think marks."""
    digit_order: str = "normal"
    """Order of the answer's digits, "normal" or "reversed" (units first)."""
    max_length: int = 128
    """Tokens of the longest example allowed (the model's context)."""
    seed: int = 42
    """The same seed and settings give the same files."""
    output_dir: str = "data"
    """The data folder."""

    def __post_init__(self) -> None:
        check_range(1, num_examples=self.num_examples)
        check_range(1, 18, max_digits=self.max_digits)  # of an int64
        check_range(2, 1000, max_operands=self.max_operands)
        check_range(1, 2**20, max_length=self.max_length)
        check_range(0, seed=self.seed)
        check_folder(output_dir=self.output_dir)
        check_choices(self, digit_order=DIGIT_ORDERS)
        longest = longest_example(self.max_digits, self.max_operands, chain=self.chain)
        if longest > self.max_length:
            raise UserMistake(
                f"max_digits {self.max_digits} with max_operands {self.max_operands} gives examples of up to "
                f"{longest} tokens, but the context holds {self.max_length}: lower one or raise max_length"
            )


@dataclass(frozen=True, kw_only=True)
class SumTrainingSettings:
    """A decoder trained on sums; a run found in the output folder is gone on with.

    None becomes the preset's value, or without a preset the document's.
    """

    preset: str | None = None
    """"fast" for two CPU cores: its values stand wherever an option is not given."""
    model_size: str | None = None
    """"small" (2.1M parameters, the default), "medium" (12.6M), "large" (25.2M) or "tiny" (0.4M)."""
    max_length: int = 128
    """Tokens of the model's context."""
    batch_size: int | None = None
    """Examples of an optimizer step (default 32)."""
    eval_batch_size: int | None = None
    """Examples of a batch in validation and test (default 64)."""
    optimizer: str | None = None
    """"adamw", or "muon" for the blocks' matrices with adamw for the rest (default adamw)."""
    learning_rate: float | None = None
    """Peak of the schedule, warm-up and then cosine (default 1e-4)."""
    weight_decay: float = 0.01
    """Decoupled, as in AdamW."""
    num_epochs: int = 10
    """Passes over the training part."""
    max_steps: int | None = None
    """Optimizer steps; -1 leaves it to num_epochs (default -1)."""
    warmup_steps: int | None = None
    """Steps of the linear rise (default 500)."""
    problem_weight: float | None = None
    """Weight of the problem's own tokens in the loss; they are chance (default 1.0)."""
    one_column_repeats: int | None = None
    """How often an epoch shows a sum of one column, where the others have a chain (default 1)."""
    data_dir: str = "data"
    """Folder of train.json, val.json and test.json."""
    output_dir: str = "checkpoints"
    """Where everything is written."""
    resume: str = "auto"
    """"auto" goes on with a run found there, "never" starts anew; or a checkpoint file."""
    num_workers: int | None = None
    """Processes that prepare batches; never more than there are cores (default 4)."""
    save_steps: int | None = None
    """Steps between checkpoints (default 1000)."""
    eval_steps: int | None = None
    """Steps between validations (default 1000)."""
    eval_examples: int | None = None
    """Validation examples, the first of the part; -1 takes all (default -1)."""
    logging_steps: int | None = None
    """Steps between lines of the log (default 100)."""
    fp16: bool = False
    """Mixed precision (GPU only)."""
    no_wandb: bool = False
    """No Weights & Biases, even where there is a key."""
    seed: int = 42
    """Fixes the first weights and the order of the batches."""

    def __post_init__(self) -> None:
        if self.preset is not None:
            check_choices(self, preset=("fast",))
        for name, (of_document, of_preset) in PRESET_OPTIONS.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, of_document if self.preset is None else of_preset)
        check_folder(output_dir=self.output_dir)
        check_choices(self, model_size=ARITHMETIC_SIZES, optimizer=SUM_OPTIMIZERS)
        check_range(1, 2**20, max_length=self.max_length)
        counts = ("batch_size", "eval_batch_size", "num_epochs", "one_column_repeats")
        check_range(1, **picked(self, *counts, "save_steps", "eval_steps", "logging_steps"))
        check_range(0, **picked(self, "weight_decay", "warmup_steps", "problem_weight", "num_workers"))
        check_range(0, 2**43, seed=self.seed)
        if self.learning_rate <= 0:
            raise UserMistake(f"learning_rate={self.learning_rate}: must be above 0")
        for name, otherwise in (("max_steps", "to go by num_epochs"), ("eval_examples", "to take all")):
            if getattr(self, name) != -1 and getattr(self, name) < 1:
                raise UserMistake(f"{name}={getattr(self, name)}: must be at least 1, or -1 {otherwise}")

    def count_steps(self, num_examples: int) -> int:
        """Optimizer steps of the whole run on so many training examples."""
        return self.max_steps if self.max_steps != -1 else self.num_epochs * -(-num_examples // self.batch_size)

"""Every setting of a GRPO run, checked before anything expensive starts; TRL is not needed to read them."""

from dataclasses import dataclass

from smollm_trm.records import UserMistake, check_choices, check_folder, check_range, picked
from smollm_trm.training.optim import OptimizerSettings
from smollm_trm.training.settings import PRECISIONS


@dataclass(frozen=True)
class GRPOSettings:
    """Settings of `train_grpo` and of `smollm-trm grpo`."""

    model: str
    """Folder of a saved model or of a training run, or its name on the Hub."""
    train: str = "both"
    """What is trained: "reasoner", "lora" or "both"; the base stays as it is."""
    data_dir: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; without it the variable GSM8K_DIR, then the Hub."""
    dataset_path: str | None = None
    """Own data instead of GSM8K; 80% is trained on, the rest is dev."""
    dev_path: str | None = None
    """A file of its own for the dev part of dataset_path, all of which is trained on then."""
    question_column: str | None = None
    """What holds the question in dataset_path; None takes the names that are known."""
    answer_column: str | None = None
    """What holds the answer there."""
    split_seed: int | None = None
    """Of the split into train and dev; None takes the one that the model was trained with."""
    max_steps: int = 200
    """Optimizer steps."""
    problems_per_step: int = 16
    """Problems whose answers are sampled for a step."""
    samples_per_problem: int = 8
    """Answers to each: the group that a reward is compared with."""
    batch_size: int = 32
    """Samples per forward and backward pass, a divisor of all samples of a step; dev problems answered at once."""
    temperature: float = 1.0
    """Of the sampling."""
    open_next_at: float = 0.3
    """Success rate of the hardest problems so far at which those with one more step join; 0 opens all at once."""
    constant_limit: int = 10
    """Steps in a row whose samples all have the same reward, after which the run ends."""
    learning_rate: float = 2e-5
    """Peak learning rate of the adapter."""
    trm_learning_rate: float | None = None
    """Peak learning rate of the reasoner; None takes five times learning_rate."""
    warmup_fraction: float = 0.05
    """Share of the run in which the learning rates climb to their peak."""
    gradient_checkpointing: bool = False
    """Keep no activations of the base: less memory, about a third more time."""
    precision: str = "auto"
    """"auto" (by the device), "fp32", "bf16" or "fp16"."""
    max_dev_samples: int | None = 1000
    """Dev problems answered before and after; None for all."""
    save_every_n_steps: int = 25
    """Optimizer steps between checkpoints."""
    output_dir: str = "outputs/grpo"
    """Checkpoints, logs, results and the model go here."""
    resume: str = "auto"
    """"auto" goes on from the newest good checkpoint, "never" starts anew."""
    wandb_project: str | None = None
    """Weights & Biases project; used only where WANDB_API_KEY is set."""
    seed: int = 42
    """Of the problems drawn and the sampling."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        counts = ("max_steps", "problems_per_step", "batch_size", "max_dev_samples", "constant_limit")
        check_range(1, **picked(self, *counts, "save_every_n_steps"))
        check_range(2, samples_per_problem=self.samples_per_problem)
        check_range(0, 1, open_next_at=self.open_next_at)
        check_range(0, 2**32 - 1, **picked(self, "seed", "split_seed"))  # as NumPy has it
        check_choices(self, train=("reasoner", "lora", "both"), resume=("auto", "never"))
        check_choices(self, precision=("auto", *PRECISIONS))
        if self.samples_per_step % self.batch_size and self.samples_per_step > self.batch_size:
            raise UserMistake(
                f"batch_size={self.batch_size}: must divide the {self.samples_per_step} samples of a step"
            )
        if not self.temperature > 0:
            raise UserMistake(f"temperature={self.temperature}: must be above 0")
        check_folder(output_dir=self.output_dir)
        self.optimizer_settings()

    @property
    def samples_per_step(self) -> int:
        return self.problems_per_step * self.samples_per_problem

    def optimizer_settings(self) -> OptimizerSettings:
        names = ("learning_rate", "trm_learning_rate", "warmup_fraction")
        return OptimizerSettings(weight_decay=0.0, **picked(self, *names))

"""Every setting of a training run, by the documents' names, checked before anything expensive starts."""

from dataclasses import dataclass, field
from typing import Any

from smollm_trm.data.prompts import PROMPT_FORMATS
from smollm_trm.models.adapters import LoraSettings
from smollm_trm.models.configuration import BASE_TRAININGS
from smollm_trm.models.reasoners.known import REASONERS, complete_settings
from smollm_trm.records import UserMistake, settings_from
from smollm_trm.training.optim import OptimizerSettings


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of `train_gsm8k` and of `smollm-trm train`."""

    dataset_path: str | None = None
    """Own data instead of GSM8K: a JSON, JSONL or CSV file, or a Hub name; 80% is trained on, the rest is dev."""
    data_dir: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; without it the variable GSM8K_DIR, then the Hub."""
    model_name: str = "HuggingFaceTB/SmolLM3-3B"
    """Base model: a Hub name, a local folder, a GGUF file, or "tiny" (a small SmolLM3 with random weights)."""
    base_training: str = "lora"
    """What of the base is trained: "lora", "frozen" (nothing) or "full" (everything)."""
    use_trm: bool = True
    """Whether there is a latent span; False trains the base alone, on `<think></think>`."""
    reasoner: str = "trm"
    """What fills the span: "trm", "coconut", or the controls "compressor", "static" and "pause"."""
    num_latents: int = 256
    """M, slots in the think block."""
    trm_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fields of the reasoner's settings, such as {"n_latent_steps": 6, "dim": 256}; {"preset": "paper"} is TRM as
    published."""
    lora_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fields of LoraSettings, such as {"r": 8}."""
    target: str = "steps"
    """"steps" trains on the solution and `#### n`, "answer" on `#### n` at once."""
    prompt_format: str = "plain"
    """"plain" (`Question: ... Answer:`), "chat" (the tokenizer's chat template, without its date) or "bare" (the
    question itself, and the answer without `####`: for the arithmetic model)."""
    keep_annotations: bool = False
    """Train on GSM8K's calculator annotations (`<<48/2=24>>`) too, in place of leaving them out."""
    batch_size: int = 2
    """Rows per step and process."""
    eval_batch_size: int = 16
    """Rows per validation step."""
    num_epochs: int = 3
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps at most; -1 for no limit but the epochs."""
    learning_rate: float = 2e-4
    """Peak learning rate of the adapter."""
    trm_learning_rate: float | None = None
    """Peak learning rate of the reasoner; None takes five times learning_rate."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    warmup_fraction: float = 0.1
    """Share of the run in which the learning rates climb to their peak."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    accumulate_grad_batches: int = 4
    """Batches per optimizer step."""
    supervise: str = "one"
    """"one" supervision step, drawn for each optimizer step, or "all" (a pass of the base for each)."""
    ema_decay: float = 0.999
    """Limit of the weight average, which is what is validated and saved for use."""
    precision: str = "auto"
    """"auto" (by the device), "32-true", "bf16-mixed" or "16-mixed"."""
    gradient_checkpointing: bool = False
    """Keep no activations of the base: less memory, about a third more time."""
    devices: int = 1
    """Processes (GPUs) per node."""
    num_nodes: int = 1
    """Nodes."""
    strategy: str = "auto"
    """Lightning's strategy; "auto" takes DDP for several devices."""
    max_length: int = 512
    """Tokens of question and solution, the latents on top; longer rows are dropped with a count."""
    max_samples: int | None = None
    """Train on so many rows only; None for all."""
    max_dev_samples: int | None = None
    """Validate on so many dev rows only; None for all."""
    val_check_interval: float = 1.0
    """Share of an epoch between validations; above 1, a number of batches. They fall on optimizer steps; the run's end
    is validated in any case."""
    patience: int | None = 5
    """Validations without a better dev loss before the run stops; None never stops it."""
    save_every_n_steps: int = 100
    """Optimizer steps between checkpoints."""
    output_dir: str = "outputs/run"
    """Checkpoints, logs, results and the model go here."""
    resume: str = "auto"
    """"auto" goes on from the newest good checkpoint, "never" starts anew; or a checkpoint file."""
    wandb_project: str | None = None
    """Weights & Biases project; used only where WANDB_API_KEY is set."""
    wandb_name: str | None = None
    """Name of the run there."""
    seed: int = 42
    """Of new weights, order and dropout."""
    split_seed: int = 42
    """Of the split into train and dev: the same for every seed, so that runs can be compared."""
    sample_answers: int = 0
    """Dev problems that are answered, for the log, at every validation."""
    progress: bool = True
    """Show a progress bar with the time that is left."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "eval_batch_size", "num_epochs", "accumulate_grad_batches", "devices",
                     "num_nodes", "save_every_n_steps", "max_length", "patience", "max_samples",
                     "max_dev_samples"):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserMistake(f"{name}={getattr(self, name)}: must be at least 1")
        if self.sample_answers < 0:
            raise UserMistake(f"sample_answers={self.sample_answers}: must be at least 0")
        if self.use_trm and self.num_latents < 1:
            raise UserMistake(f"num_latents={self.num_latents}: must be at least 1; for no latents set use_trm=False")
        choices = {
            "reasoner": tuple(REASONERS),
            "base_training": BASE_TRAININGS,
            "target": ("steps", "answer"),
            "prompt_format": tuple(PROMPT_FORMATS),
            "supervise": ("one", "all"),
            "precision": ("auto", "32-true", "bf16-mixed", "16-mixed"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserMistake(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if "fsdp" in self.strategy or "deepspeed" in self.strategy:  # weights must be whole to be averaged and saved
            raise UserMistake(f"strategy={self.strategy!r}: it cuts weights into parts; choose 'ddp'")
        if self.max_steps != -1 and self.max_steps < 1:
            raise UserMistake(f"max_steps={self.max_steps}: must be at least 1, or -1 for no limit but the epochs")
        for name in ("val_check_interval", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise UserMistake(f"{name}={getattr(self, name)}: must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise UserMistake(f"ema_decay={self.ema_decay}: must be at least 0 and below 1")
        self.model_config()
        self.lora_settings()
        self.optimizer_settings()

    def model_config(self) -> dict[str, Any]:
        """The part that is saved with the model: fields of `LatentReasoningConfig`."""
        return {
            "base_training": self.base_training,
            "reasoner": self.reasoner if self.use_trm else None,
            "reasoner_settings": complete_settings(self.reasoner, self.trm_kwargs) if self.use_trm else {},
            "num_latents": self.num_latents if self.use_trm else 0,
            "target": self.target,
            "prompt_format": self.prompt_format,
            "keep_annotations": self.keep_annotations,
        }

    def lora_settings(self) -> LoraSettings:
        """The adapter's part."""
        return settings_from(LoraSettings, self.lora_kwargs, "lora_kwargs")

    def optimizer_settings(self) -> OptimizerSettings:
        """The optimizer's part."""
        return OptimizerSettings(
            learning_rate=self.learning_rate,
            trm_learning_rate=self.trm_learning_rate,
            weight_decay=self.weight_decay,
            warmup_fraction=self.warmup_fraction,
        )

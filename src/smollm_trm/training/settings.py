"""Every setting of a training run, by the documents' names, checked before anything expensive starts."""

from dataclasses import dataclass, field, fields
from typing import Any

from smollm_trm.data.curriculum import Curriculum
from smollm_trm.data.prompts import PROMPT_FORMATS, STEP_SOURCES, TARGETS
from smollm_trm.models.adapters import LoraSettings
from smollm_trm.models.configuration import BASE_TRAININGS
from smollm_trm.models.reasoners.known import complete_settings, reasoner_class
from smollm_trm.models.reasoners.reasoner import Reasoner
from smollm_trm.records import UserMistake, check_choices, check_folder, check_range, picked, settings_from
from smollm_trm.training.optim import OptimizerSettings

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""What everyone calls them, and what Lightning does."""

HELP_GROUPS = (
    {
        "mode": "A curriculum over the steps of a solution",
        "dataset_path": "Data",
        "model_name": "Model",
        "target": "What is asked and written",
        "batch_size": "Training",
        "precision": "Machine",
        "val_check_interval": "Validation, checkpoints and logs",
    },
    {"trm_kwargs": reasoner_class("trm").Settings, "lora_kwargs": LoraSettings},
)
"""Headings of `train --help`, by the first option below each; options that hold fields, of the reasoner "trm" here."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Curriculum):
    """Settings of `train_gsm8k` and of `smollm-trm train`."""

    dataset_path: str | None = None
    """Own data instead of GSM8K: a JSON, JSONL, CSV or Parquet file, or a Hub name; 80% is trained on, 20% is dev."""
    question_column: str = "question"
    """Its column or key with the questions; answer_column likewise."""
    answer_column: str = "answer"
    """Its column or key with the answers: solutions that end in `#### answer`, or answers alone, numbers or words."""
    dev_path: str | None = None
    """A file of its own for the dev part of dataset_path, all of which is trained on then."""
    data_dir: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; without it the variable GSM8K_DIR, then the Hub."""
    max_length: int = 512
    """Tokens of question and solution, the latents on top; longer rows are dropped with a count."""
    max_samples: int | None = None
    """Train on so many rows only; None for all."""
    max_dev_samples: int | None = None
    """Validate on so many dev rows only; None for all."""
    model_name: str = "HuggingFaceTB/SmolLM3-3B"
    """Base model: a Hub name, a local folder, a GGUF file, or "tiny" (a small SmolLM3 with random weights)."""
    trust_remote_code: bool = False
    """Run code that model_name brings with it; without this word none is run."""
    load_in_4bit: bool = False
    """Keep the base's linear layers in 4 bits (NF4 of bitsandbytes: pip install 'smollm-trm[quantized]')."""
    load_model_path: str | None = None
    """Folder of an earlier run or saved model to start from: its base, its adapter and, where it is the same one, its
    reasoner. Without it, model_name."""
    base_training: str = "lora"
    """What of the base is trained: "lora", "frozen" (nothing) or "full" (everything)."""
    use_trm: bool = True
    """Whether there is a latent span; False trains the base alone, on `<think></think>`."""
    reasoner: str = "trm"
    """What fills the span: "trm", "coconut", or the controls "compressor", "static" and "pause"."""
    num_latents: int = 256
    """M, slots in the think block; under a curriculum c_thought * max_latent_stage."""
    latents_per_step: int = 4
    """Latents that training asks, besides the answer, for the result of each step that is not written (target="answer",
    rows with calculator annotations, reasoners "trm" and "compressor"); 0 asks nothing."""
    reasoner_steps: int = 0
    """Steps of 32 rows that the reasoner first makes alone, on the results of the steps, while the base stands still
    (target="answer", reasoners "trm" and "compressor"): beside LoRA from the start, a real base ignores it."""
    trm_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fields of the reasoner's settings, such as {"n_latent_steps": 6, "dim": 256}; {"preset": "paper"} is TRM as
    published."""
    lora_kwargs: dict[str, Any] = field(default_factory=dict)
    """Fields of LoraSettings, such as {"r": 8}."""
    target: str = "steps"
    """"steps" trains on the solution and `#### n`, "answer" on `#### n` at once, "think" on the solution as text inside
    the think block and the answer behind it (without latents)."""
    prompt_format: str = "plain"
    """"plain" (`Question: ... Answer:`), "chat" (the tokenizer's chat template, without its date), "bare" (the
    question itself, and the answer without `####`: for the arithmetic model) or "coconut" (Coconut's markers)."""
    steps_from: str = "lines"
    """What a step is: one of the solution's "lines", or of its calculator "annotations" and nothing else."""
    keep_annotations: bool = False
    """Train on GSM8K's calculator annotations (`<<48/2=24>>`) too, in place of leaving them out."""
    batch_size: int = 2
    """Rows per step and process."""
    eval_batch_size: int = 16
    """Rows per validation step."""
    num_epochs: int = 3
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps at most; -1 for no limit but the epochs. A run that has ended goes on where this is raised,
    with a new warm-up and cosine."""
    learning_rate: float = 2e-4
    """Peak learning rate of the adapter."""
    trm_learning_rate: float | None = None
    """Peak learning rate of a reasoner up to 128 wide, divided by width / 128 for a wider one; None takes five times
    learning_rate."""
    weight_decay: float = 0.01
    """AdamW's decay, on matrices only."""
    warmup_fraction: float = 0.1
    """Share of the run in which the learning rates climb to their peak."""
    optimizer: str = "adamw"
    """"adamw", or "adamw_8bit" where bitsandbytes is installed."""
    reset_optimizer: bool = False
    """Begin every stage with a fresh optimizer."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    accumulate_grad_batches: int = 4
    """Batches per optimizer step."""
    supervise: str = "one"
    """"one" supervision step, drawn for each optimizer step, or "all" (a pass of the base for each)."""
    ema_decay: float = 0.999
    """Limit of the weight average, which is what is validated and saved for use."""
    precision: str = "auto"
    """"auto" (by the device), "fp32", "bf16" or "fp16"; Lightning's names ("32-true", "bf16-mixed", "16-mixed") too."""
    gradient_checkpointing: bool = False
    """Keep no activations of the base: less memory, about a third more time."""
    devices: int = 1
    """Processes (GPUs) per node."""
    num_nodes: int = 1
    """Nodes."""
    strategy: str = "auto"
    """Lightning's strategy; "auto" takes DDP for several devices."""
    val_check_interval: float = 1.0
    """Share of an epoch between validations; above 1, a number of batches. They fall on optimizer steps; the run's end
    is validated in any case."""
    patience: int | None = 5
    """Validations without a better dev loss before the run stops; None never stops it, nor does a curriculum."""
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
        super().__post_init__()
        counts = ("batch_size", "eval_batch_size", "num_epochs", "accumulate_grad_batches", "devices", "num_nodes")
        check_range(1, **picked(self, *counts, "save_every_n_steps", "patience", "max_samples", "max_dev_samples"))
        check_range(1, 2**20, max_length=self.max_length)
        check_range(0, **picked(self, "sample_answers", "reasoner_steps"))
        check_range(0, 2**40, **picked(self, "seed", "split_seed"))
        if self.reasoner_steps and self.use_trm:
            says_results = reasoner_class(self.reasoner).words is not Reasoner.words
            taught = self.target == "answer" and self.mode is None and self.latents_per_step > 0 and says_results
            if not taught or self.load_model_path is not None or self.base_training == "full":
                told = "needs target='answer', a reasoner 'trm' or 'compressor', latents_per_step above 0, and "
                told += "neither mode, load_model_path nor base_training='full'"
                raise UserMistake(f"reasoner_steps={self.reasoner_steps}: the reasoner alone {told}")
        if self.use_trm and self.num_latents < 1:
            raise UserMistake(f"num_latents={self.num_latents}: must be at least 1; for no latents set use_trm=False")
        precisions = ("auto", *PRECISIONS, *PRECISIONS.values())
        check_choices(self, base_training=BASE_TRAININGS, target=TARGETS, steps_from=STEP_SOURCES)
        check_choices(self, prompt_format=PROMPT_FORMATS, supervise=("one", "all"), precision=precisions)
        if self.strategy != "auto" and not self.strategy.startswith("ddp"):
            cuts = "it cuts weights into parts; " if self.strategy.startswith(("fsdp", "deepspeed")) else ""
            raise UserMistake(f"strategy={self.strategy!r}: {cuts}choose 'ddp'")
        check_folder(output_dir=self.output_dir)
        if self.max_steps != -1 and self.max_steps < 1:
            raise UserMistake(f"max_steps={self.max_steps}: must be at least 1, or -1 for no limit but the epochs")
        for name in ("val_check_interval", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise UserMistake(f"{name}={getattr(self, name)}: must be above 0")
        if not 0 <= self.ema_decay < 1:
            raise UserMistake(f"ema_decay={self.ema_decay}: must be at least 0 and below 1")
        if self.load_in_4bit and self.wants_fp32_base:
            raise UserMistake("load_in_4bit=True: base_training='full' and reasoner='coconut' cannot do with 4 bits")
        if self.trust_remote_code and self.load_model_path is not None:
            raise UserMistake("trust_remote_code=True is for model_name: leave it or load_model_path out")
        if self.dev_path is not None and self.dataset_path is None:
            raise UserMistake(f"dev_path={self.dev_path!r}: give dataset_path too, the rows to train on")
        if self.mode is not None and self.target != "steps":
            raise UserMistake(f"mode={self.mode!r}: it decides what is written; leave target out")
        if self.has_latents and not self.use_trm:
            raise UserMistake(f"mode={self.mode!r} needs latents: leave use_trm=False out, or choose 'no_thoughts'")
        if self.mode == "pause" and self.reasoner != "pause":
            raise UserMistake(f"mode='pause' with reasoner={self.reasoner!r}: set reasoner='pause' (or mode='coconut')")
        if self.target == "think" and self.use_trm:
            raise UserMistake("target='think' thinks in text, without latents: set use_trm=False")
        if self.prompt_format == "bare" and self.mode is not None:
            raise UserMistake("prompt_format='bare' has no steps: choose another, or no mode")
        self.model_config()
        self.lora_settings()
        self.optimizer_settings()

    @property
    def curriculum(self) -> Curriculum | None:
        return None if self.mode is None else Curriculum(**picked(self, *(one.name for one in fields(Curriculum))))

    @property
    def most_latents(self) -> int:
        """M, or 0 where nothing fills a span."""
        if not self.use_trm:
            return 0
        return self.num_latents if self.curriculum is None else self.longest_span

    @property
    def wants_fp32_base(self) -> bool:
        """Whether the base's weights have to be fp32, whatever the precision of training."""
        return self.base_training == "full" or (self.most_latents > 0 and reasoner_class(self.reasoner).wants_fp32_base)

    def model_config(self) -> dict[str, Any]:
        """The part that is saved with the model: fields of `LatentReasoningConfig`."""
        has_span = self.most_latents > 0
        return {
            **picked(self, "base_training", "target", "prompt_format", "steps_from", "keep_annotations"),
            "reasoner": self.reasoner if has_span else None,
            "reasoner_settings": complete_settings(self.reasoner, self.trm_kwargs) if has_span else {},
            "num_latents": self.most_latents,
            "think": has_span or self.prompt_format != "coconut",
        }

    def lora_settings(self) -> LoraSettings:
        return settings_from(LoraSettings, self.lora_kwargs, "lora_kwargs")

    def optimizer_settings(self) -> OptimizerSettings:
        names = ("learning_rate", "trm_learning_rate", "weight_decay", "warmup_fraction", "optimizer")
        return OptimizerSettings(**picked(self, *names))

"""Every setting of the phases, by the training guide's names and with its defaults."""

from dataclasses import dataclass, field
from typing import Any

from smollm_trm.phases.problems import PROBLEM_SOURCES
from smollm_trm.records import UserMistake, check_choices, check_folder, check_range, picked

PHASE_PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def refuse_rates(settings: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < 1:
            raise UserMistake(f"{name}={getattr(settings, name)}: must be above 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class PhaseRun:
    """What the training runs of the phases have in common."""

    output_dir: str
    resume: str = "auto"
    """"auto" goes on from the newest good checkpoint, "never" starts anew; or a checkpoint file."""
    seed: int = 0
    """Of new weights and order."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_folder(output_dir=self.output_dir)
        check_range(0, 2**43, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class CompressorRunSettings(PhaseRun):
    """Settings of `smollm-trm phases compressor`."""

    stage: str = "1a"
    """"1a" (identity on text) or "1b" (thinking trajectories, from stage 1a's compressor)."""
    model_name: str = "HuggingFaceTB/SmolLM3-3B"
    """The base whose hidden states are compressed: a Hub name, a folder, a GGUF file or a saved model."""
    data: str | None = None
    """Text: "fineweb-edu" (stage 1a's default), "gsm8k", a .txt or .jsonl file (field "text"), a folder of them; or,
    for stage 1b, a folder that `phases datagen` wrote (its default "./data/hidden_pairs")."""
    data_dir: str | None = None
    """Folder with GSM8K's train.jsonl for data="gsm8k"; without it GSM8K_DIR, then the Hub."""
    d_compressed: int = 256
    """D', the compressed dimension."""
    sweep: list[int] = field(default_factory=list)
    """More values of D' to train and compare in the same passes over the text, such as [64, 128, 512]."""
    compressor_checkpoint: str | None = None
    """Stage 1b: stage 1a's compressor, a folder or a Hub name."""
    start: str = "pca"
    """What stage 1a starts from: "pca" of the training text's states, or "random" directions."""
    batch_size: int = 8
    """Texts per step."""
    num_epochs: int = 10
    """Passes over the text at most; two without a better dev error end it. 0 keeps the start."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    num_samples: int = 50_000
    """Texts read: 90% are trained on, 5% choose the checkpoint, 5% are reported."""
    max_length: int = 512
    """Tokens of a text that are read."""
    precision: str = "auto"
    """Of the base's weights: "auto" (by the device), "fp32", "bf16" or "fp16"."""
    output_dir: str = "outputs/compressor"
    """The compressor (`model/`), figures and the sweep's plot go here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, stage=("1a", "1b"), start=("pca", "random"), precision=PHASE_PRECISIONS)
        check_range(1, **picked(self, "d_compressed", "batch_size", "num_samples"))
        check_range(2, max_length=self.max_length)
        check_range(0, num_epochs=self.num_epochs)
        refuse_rates(self, "learning_rate")
        if any(width < 1 for width in self.sweep):
            raise UserMistake(f"sweep={self.sweep}: every D' must be at least 1")
        if (self.stage == "1b") != (self.compressor_checkpoint is not None):
            need = "name stage 1a's compressor" if self.stage == "1b" else "it is for stage 1b; leave it out"
            raise UserMistake(f"compressor_checkpoint={self.compressor_checkpoint!r} at stage {self.stage}: {need}")
        if self.stage == "1b" and self.sweep:
            raise UserMistake("sweep: stage 1b goes on with one compressor; leave it out")


@dataclass(frozen=True, kw_only=True)
class DatagenSettings:
    """Settings of `smollm-trm phases datagen`; the processes of `torchrun` share the problems."""

    model_name: str = "HuggingFaceTB/SmolLM3-3B"
    """The model that thinks in text: a Hub name, a folder, or a saved model trained with target="think"."""
    prompt_format: str | None = None
    """How an untuned base is asked: "chat" (where its tokenizer has a template) or "plain"."""
    dataset: str = "gsm8k"
    """gsm8k, aime, humaneval, mbpp or apps; comma-separated for mixing, a problem of each in turn."""
    data_dir: str | None = None
    """Folder with `<dataset>.jsonl` of the Hub's fields (for gsm8k also its train.jsonl); without it, the Hub."""
    num_samples: int = 1000
    """Problems to think about."""
    batch_size: int = 4
    """Problems generated at once."""
    max_new_tokens: int = 512
    """Tokens a thought may take; one that is not closed by then is counted and left out."""
    output_dir: str = "./data/hidden_pairs"
    """Shards of pairs, `datagen_config.json` and `index.json` go here."""
    checkpoint_every: int = 100
    """Problems of a shard, which is written whole: what a killed process loses at most."""
    no_auto_resume: bool = False
    """Start anew in place of going on where an earlier run stopped."""
    precision: str = "auto"
    """Of the base's weights: "auto" (by the device), "fp32", "bf16" or "fp16"."""

    def __post_init__(self) -> None:
        check_folder(output_dir=self.output_dir)
        check_choices(self, precision=PHASE_PRECISIONS)
        check_range(1, **picked(self, "num_samples", "batch_size", "max_new_tokens", "checkpoint_every"))
        for name in self.datasets:
            if name not in PROBLEM_SOURCES:
                raise UserMistake(f"dataset={self.dataset!r}: {name!r} is none of {', '.join(PROBLEM_SOURCES)}")

    @property
    def datasets(self) -> list[str]:
        return [name.strip() for name in self.dataset.split(",")]


@dataclass(frozen=True, kw_only=True)
class SequenceSettings(PhaseRun):
    """Settings of `smollm-trm phases trm`."""

    data_path: str = "./data/hidden_pairs"
    """Folder of pairs that `phases datagen` wrote."""
    data: str | None = None
    """The same under a shorter name."""
    compressor_checkpoint: str = "outputs/compressor"
    """The compressor, made on the same base: a folder or a Hub name."""
    batch_size: int = 32
    """Pairs per step."""
    num_epochs: int = 100
    """Passes over the pairs at most."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    n_layers: int = 2
    """Transformer layers of the network."""
    n_heads: int = 8
    """Attention heads of each."""
    n_latent_steps: int = 6
    """Latent recursions, n."""
    n_deep_recursions: int = 3
    """Deep recursions, T."""
    n_supervision_steps: int = 8
    """Supervision steps, N_sup."""
    use_halting: bool = True
    """Train the halting head."""
    halt_threshold: float = 0.7
    """Cosine above which a step should have stopped (bce_halt_loss), at the start."""
    adaptive_halt_threshold: bool = True
    """After each epoch take 0.95 times its mean cosine as the threshold."""
    bce_halt_loss: bool = False
    """Binary cross-entropy against the threshold in place of the squared error to the cosine itself."""
    halt_loss_weight: float = 0.5
    """Of the halting head's loss."""
    per_step_updates: bool = True
    """An optimizer step after each supervision step; False makes one for all of them."""
    use_ema: bool = True
    """Average the weights; the average is what is validated and saved."""
    ema_decay: float = 0.999
    """Limit of the average's decay."""
    patience: int = 10
    """Validations without a better dev error before training stops."""
    output_dir: str = "outputs/sequence_trm"
    """The trained recursion (`model/`) and its figures go here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, **picked(self, "batch_size", "num_epochs", "patience"), **self.network())
        check_range(0, halt_loss_weight=self.halt_loss_weight)
        refuse_rates(self, "learning_rate", "halt_threshold", "ema_decay")

    def network(self) -> dict[str, Any]:
        recursion = ("n_latent_steps", "n_deep_recursions", "n_supervision_steps")
        return picked(self, "n_layers", "n_heads", *recursion)


@dataclass(frozen=True, kw_only=True)
class AssembleSettings(PhaseRun):
    """Settings of `smollm-trm phases assemble`."""

    model_name: str = "HuggingFaceTB/SmolLM3-3B"
    """The base that thought in `data_path`."""
    data_path: str = "./data/hidden_pairs"
    """Pairs whose true states the base is taught to read: problems with a number as their answer."""
    compressor_checkpoint: str = "outputs/compressor"
    """Phase 1."""
    trm_checkpoint: str = "outputs/sequence_trm"
    """Phase 2."""
    max_steps: int = 400
    """Optimizer steps of LoRA on true states."""
    batch_size: int = 32
    """Problems per step."""
    learning_rate: float = 2e-3
    """Peak learning rate of LoRA."""
    precision: str = "auto"
    """Of the base's weights: "auto" (by the device), "fp32", "bf16" or "fp16"."""
    output_dir: str = "outputs/assembled"
    """The assembled model (`model/`) goes here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, precision=PHASE_PRECISIONS)
        check_range(1, **picked(self, "max_steps", "batch_size"))
        refuse_rates(self, "learning_rate")


@dataclass(frozen=True, kw_only=True)
class CompareStatesSettings:
    """Settings of `smollm-trm phases compare`."""

    model: str = "outputs/assembled"
    """The assembled model."""
    thinking: str = "HuggingFaceTB/SmolLM3-3B"
    """The base that thinks in text: its states are the true ones."""
    models: dict[str, str] = field(default_factory=dict)
    """More arms by name and folder, such as '{"does not think": "outputs/no_think"}'."""
    part: str = "test"
    """"test" or "dev" of the problems in data_dir."""
    data_dir: str | None = None
    """Folder with train.jsonl and test.jsonl; without it GSM8K_DIR, then the Hub."""
    max_samples: int | None = None
    """Only the first so many problems; None for all."""
    batch_size: int = 32
    """Problems generated at once."""
    max_new_tokens: int = 512
    """Tokens a thought may take."""
    precision: str = "auto"
    """Of the base's weights: "auto" (by the device), "fp32", "bf16" or "fp16"."""
    seed: int = 42
    """Of the split, and of whose state another problem gets."""
    output_dir: str = "outputs/states"
    """Table, plot and figures go here."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        check_folder(output_dir=self.output_dir)
        check_choices(self, precision=PHASE_PRECISIONS)
        check_range(1, **picked(self, "batch_size", "max_new_tokens"))
        check_range(2, max_samples=self.max_samples)  # another problem lends its state

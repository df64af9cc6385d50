"""The configuration of a latent-reasoning model: its base's configuration, a reasoner, and how questions are asked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from smollm_trm.models.reasoners.known import complete_settings
from smollm_trm.records import UserMistake, check_choices, first_line, is_of_type

SUPPORTED_BASES = ("smollm3", "llama", "qwen2", "qwen3", "gpt2", "arcee")
"""Decoders whose head is one linear layer and nothing else; many others scale or cap their logits."""
BASE_TRAININGS = ("lora", "frozen", "full")


def registered_for(auto_class: type, key: Any) -> Callable[[type], type]:
    """Make one of transformers' `Auto*` classes know a class (again, where a notebook's cell is run twice)."""

    def register(own_class: type) -> type:
        auto_class.register(key, own_class, exist_ok=True)
        return own_class

    return register


@registered_for(AutoConfig, "latent_reasoning")
class LatentReasoningConfig(PreTrainedConfig):
    """Hugging Face's layout of a vision-language model, with a reasoner where they have the vision tower.

    `config.json` holds it, `AutoConfig` reads it; values of a wrong type are refused.
    """

    model_type = "latent_reasoning"
    sub_configs = {"text_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    """Of the base."""
    base_model: str = ""
    """Where the base's weights come from: a Hub name or a folder. Empty: they are saved with the model."""
    base_training: str = "lora"
    """What of the base is trained: "lora", "frozen" (nothing) or "full" (everything)."""
    reasoner: str | None = "trm"
    """What fills the span, by its name in `REASONERS`; None is the baseline, on `<think></think>`."""
    reasoner_settings: dict | None = None
    """Fields of the reasoner's settings; {"preset": "paper"} is TRM as published."""
    num_latents: int = 256
    """M, the most latents that the reasoner makes; slots in the think block."""
    num_slots: int | None = None
    """Slots in the think block where a curriculum says so, 0 to M; a prompt without a span then is as good as any."""
    slot_token_id: int | None = None
    """The placeholder that marks a slot."""
    target: str = "steps"
    """What is written; this and the next five as in `PromptEncoder`."""
    prompt_format: str = "plain"
    keep_annotations: bool = False
    steps_from: str = "lines"
    skip_steps: int = 0
    think: bool = True
    notes: dict | None = None
    """Plain values that are kept with the model: what it was trained on, how it was evaluated."""

    def __post_init__(self, **kwargs: Any) -> None:
        for name, hint in LatentReasoningConfig.__annotations__.items():
            if not is_of_type(value := getattr(self, name), hint):
                raise UserMistake(f"{name}={value!r} must be {getattr(hint, '__name__', hint)}")
        if isinstance(self.text_config, Mapping):
            refuse_unsupported(self.text_config.get("model_type"))
            self.text_config = AutoConfig.for_model(**self.text_config)
        elif self.text_config is None:
            self.text_config = AutoConfig.for_model("smollm3")
        refuse_unsupported(self.text_config.model_type)
        check_choices(self, base_training=BASE_TRAININGS)
        if self.reasoner is not None:
            if self.num_latents > (positions := self.text_config.max_position_embeddings):
                raise UserMistake(f"num_latents={self.num_latents}: the base has only {positions} positions")
            self.reasoner_settings = complete_settings(self.reasoner, self.reasoner_settings)
        else:
            self.reasoner_settings, self.num_latents = {}, 0
        self.notes = dict(self.notes or {})
        for name in ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id"):
            kwargs[name] = getattr(self.text_config, name, None)
        super().__post_init__(**kwargs)

    # Of the base, under the names that transformers looks for.
    hidden_size = property(lambda self: self.text_config.hidden_size)
    num_hidden_layers = property(lambda self: self.text_config.num_hidden_layers)
    vocab_size = property(lambda self: self.text_config.vocab_size)
    max_position_embeddings = property(lambda self: self.text_config.max_position_embeddings)


@contextmanager
def readable(what: str | Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read, as one line for the user."""
    try:
        yield
    except UserMistake:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        reason = f"cannot be read ({first_line(error)}); save or download the model again"
        raise UserMistake(f"{what} {reason}") from error


def refuse_other_tensors(where: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse what was saved of another configuration: tensors that are missing, unknown or of another shape."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            raise UserMistake(f"{where} ({name} is {'unknown' if name in found else 'missing'})")
        if (has := tuple(found[name].shape)) != (needs := tuple(wanted[name].shape)):
            raise UserMistake(f"{where} ({name} has shape {has}, not {needs})")


def refuse_unsupported(model_type: str | None) -> None:
    """Refuse a base whose head would be dropped."""
    if model_type not in SUPPORTED_BASES:
        kinds = ", ".join(SUPPORTED_BASES)
        raise UserMistake(f"a base of the kind {model_type!r} is not supported: choose one of {kinds}")


def refuse_unknown_names(given: Mapping[str, Any]) -> None:
    """Refuse a misspelt setting, which Hugging Face's configurations take in silence."""
    known = LatentReasoningConfig.__annotations__
    for name in given:
        if name not in known:
            raise UserMistake(f"unknown setting {name!r}; known are {', '.join(known)}")

"""A model that is saved without its base: made on one, saved beside it, put together again.

A saved folder holds `config.json`, the reasoner in `model.safetensors`, the LoRA adapter in `adapter/`, the tokenizer
(whose chat template writes the latent span) and a card; the base only where it is nowhere else. No pickle.
"""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from peft import PeftConfig
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from smollm_trm.data.prompts import PromptEncoder, padding_token_id, slot_token_id
from smollm_trm.models.adapters import (
    ADAPTER_FOLDER,
    LoraSettings,
    adapter_layers,
    add_adapter,
    load_adapter,
    save_adapter,
    take_off_adapter,
)
from smollm_trm.models.configuration import LatentReasoningConfig, readable, refuse_unknown_names
from smollm_trm.models.hub import license_of, model_card, push_model
from smollm_trm.models.loading import (
    BaseAndTokenizer,
    LoadedBase,
    anchor_embedding,
    as_list,
    default_device,
    default_dtype,
    is_local,
    load_base,
    no_progress_bars,
    own_random_state,
    part_of_base,
    with_markers,
    with_rows,
)
from smollm_trm.models.modeling import CALIBRATION_QUESTIONS, LatentReasoningPreTrainedModel, fresh_reasoner
from smollm_trm.models.reasoners.known import reasoner_class
from smollm_trm.models.storage import (
    REASONER_PREFIX,
    read_config,
    read_weights,
    saved_model_folder,
    weights_to_save,
)
from smollm_trm.records import UserMistake, picked, write_text


class SavedBesideItsBase(LatentReasoningPreTrainedModel):
    """`from_base`, and transformers' `from_pretrained`, `save_pretrained` and `push_to_hub` for such a model."""

    @classmethod
    def assemble(cls, base: LoadedBase, config: LatentReasoningConfig) -> Self:
        """A model around a loaded base, which is taken as it is, not copied; the reasoner is fresh."""
        with torch.device("meta"):
            model = cls(config)
        model.model.language_model, model.lm_head = base.decoder, base.head
        if model.use_trm:
            model.model.reasoner = fresh_reasoner(config).to(base.head.weight.device)
        model.use_tokenizer(base.tokenizer)
        ends = {base.tokenizer.eos_token_id, *base.ends}
        model.generation_config.eos_token_id = sorted(ends) if len(ends) > 1 else base.tokenizer.eos_token_id
        return model

    @classmethod
    def from_base(
        cls,
        model_name: "str | BaseAndTokenizer | SavedBesideItsBase" = "HuggingFaceTB/SmolLM3-3B",
        *,
        lora: LoraSettings | None = None,
        dtype: torch.dtype = torch.float32,
        tiny_texts: list[str] | None = None,
        seed: int = 0,
        calibration: Sequence[str] = CALIBRATION_QUESTIONS,
        trust_remote_code: bool = False,
        load_in_4bit: bool = False,
        **config: Any,
    ) -> Self:
        """A base with a fresh adapter and a fresh reasoner.

        Args:
            model_name: a name on the Hub, a folder, a GGUF file, "tiny", or a model with its tokenizer, taken over; or
                a model of ours to go on from: its base, its adapter and, where it is of the same kind, its reasoner.
            dtype: of the base's weights; adapter and reasoner are fp32.
            tiny_texts: what the tokenizer of "tiny" is trained on.
            seed: of every new weight; the global random state is left as it was.
            calibration: questions that a fresh reasoner's statistics are measured on; none leaves it to training.
            trust_remote_code: run code that the base brings with it; without this word none is run, and nothing asks.
            load_in_4bit: keep the base's linear layers in 4 bits (bitsandbytes).
            config: fields of `LatentReasoningConfig`, such as `reasoner`, `num_latents`, `target`.
        """
        refuse_unknown_names(config)
        with own_random_state(), no_progress_bars():
            training, earlier = config.setdefault("base_training", "lora"), None
            if isinstance(model_name, SavedBesideItsBase):
                earlier, base = model_name, model_name.as_base(with_adapter=training == "lora")
                if license := earlier.config.notes.get("license"):
                    config["notes"] = {"license": license, **(config.get("notes") or {})}
                config.setdefault("base_model", "" if training == "full" else earlier.config.base_model)
            else:
                options = {"trust_remote_code": trust_remote_code, "load_in_4bit": load_in_4bit}
                base = load_base(model_name, dtype=dtype, tiny_texts=tiny_texts, seed=seed, **options)
            place = str(Path(base.name).expanduser().resolve()) if base.name and is_local(base.name) else base.name
            config.setdefault("base_model", "" if training == "full" else place)
            if config.get("reasoner", "trm") is not None:
                base = with_markers(base) if config.get("prompt_format") == "coconut" else base
                base = base._replace(tokenizer=copy.deepcopy(base.tokenizer))
                config["slot_token_id"] = slot_token_id(base.tokenizer)
                base = with_rows(base, config["slot_token_id"] + 1)
            text_config = copy.deepcopy(base.decoder.config)
            text_config.name_or_path = ""
            if base.name and is_local(base.name) and (license := license_of(base.name)):
                config["notes"] = {"license": license, **(config.get("notes") or {})}  # the card may be far from it
            torch.manual_seed(seed)
            model = cls.assemble(base, LatentReasoningConfig(text_config=text_config, **config))
            if training == "lora" and not (earlier and adapter_layers(base.decoder)):
                add_adapter(base.decoder, (lora or LoraSettings()).to_peft(text_config.model_type))
            model.freeze_base()
            if model.reasoner is not None:
                model.reasoner.start_near(base.decoder.get_input_embeddings().weight.detach(), anchor_embedding(base))
                if earlier and earlier.config.reasoner == model.config.reasoner:
                    model.take_reasoner(earlier)
                elif calibration:
                    try:
                        model.fit_reasoner(calibration)
                    except UserMistake as error:
                        raise UserMistake(f"{error}; give questions of yours, calibration=[...]") from error
        return model

    def as_base(self, *, with_adapter: bool) -> LoadedBase:
        """This model without its reasoner, as what another one is built on; its adapter is kept or merged."""
        if not with_adapter:
            self.merge_and_unload()
        ends = as_list(self.generation_config.eos_token_id)
        return LoadedBase(self.model.language_model, self.lm_head, self.tokenizer, "", ends)

    def take_reasoner(self, earlier: "SavedBesideItsBase") -> None:
        try:
            self.model.reasoner.load_state_dict(earlier.model.reasoner.state_dict())
        except RuntimeError as error:
            reason = "its reasoner has other settings or another number of latents"
            raise UserMistake(f"load_model_path: {reason}; set the same, or start without it") from error

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        model_name: str | BaseAndTokenizer | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        load_in_4bit: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a saved model, on the base it names.

        Args:
            pretrained_model_name_or_path: what `save_pretrained` or a training run wrote, or a name on the Hub.
            model_name: another place of the same base, or the loaded base and its tokenizer, which are taken over.
            dtype: of the base's weights; "auto" is bf16 or fp16 by the GPU's capability, and fp32 on a CPU or where
                the reasoner wants it.
            device: where to; "auto" is the GPU where there is one.
            attn_implementation: "sdpa", "eager", ...; transformers' choice when None.
            trust_remote_code: run code that `model_name` brings; never that of a base which only the saved model names.
            load_in_4bit: keep the linear layers of a base that lies elsewhere in 4 bits.
            kwargs: what transformers' own loading passes on; not used, as `args`.

        Raises:
            UserMistake: not such a folder, a tensor missing, unknown or of another shape.
        """
        if isinstance(device_map := kwargs.pop("device_map", None), str | torch.device):
            device, device_map = device_map, None  # "auto" is one GPU here
        for name, value in (("device_map", device_map), *kwargs.items()):
            if name in ("device_map", "quantization_config", "load_in_8bit") and value is not None:
                raise UserMistake(f"from_pretrained: {name} is not supported; choose device, dtype and load_in_4bit")
            if name in LatentReasoningConfig.__annotations__:
                raise UserMistake(f"from_pretrained: {name} is what the saved model says; from_base takes another")
        if trust_remote_code and not isinstance(model_name, str):
            raise UserMistake("trust_remote_code=True: only the saved model names that base; name it by model_name")
        dtype = kwargs.get("torch_dtype") or dtype
        folder = saved_model_folder(pretrained_model_name_or_path, revision)
        config = read_config(folder)
        device = default_device() if device == "auto" else torch.device(device)
        if dtype in ("auto", None) and config.reasoner and reasoner_class(config.reasoner).wants_fp32_base:
            dtype = torch.float32
        dtype = default_dtype(device) if dtype in ("auto", None) else getattr(torch, str(dtype).split(".")[-1], None)
        if not isinstance(dtype, torch.dtype):
            raise UserMistake("dtype: choose 'auto', 'float32', 'bfloat16' or 'float16'")
        with own_random_state(), no_progress_bars():
            if model_name is None and not config.base_model:
                if load_in_4bit:
                    raise UserMistake(f"load_in_4bit=True: the base of {folder} was saved with it, whole")
                model = cls._with_saved_base(folder, config, dtype)
            else:
                options = {"trust_remote_code": bool(trust_remote_code), "load_in_4bit": load_in_4bit}
                base = load_base(model_name or config.base_model, dtype=dtype, **options)
                model = cls._with_named_base(folder, config, base)
            if config.base_training == "lora":
                load_adapter(model.model.language_model, folder / ADAPTER_FOLDER)
        tokenizer = part_of_base(AutoTokenizer, str(folder))
        with readable(f"{folder}: the tokenizer"):
            model.use_tokenizer(tokenizer)
        if (how := folder / "generation_config.json").is_file():
            with readable(how):
                model.generation_config = GenerationConfig.from_pretrained(folder)
        model.freeze_base()
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model.to(device).eval()

    @classmethod
    def _with_saved_base(cls, folder: Path, config: LatentReasoningConfig, dtype: torch.dtype) -> Self:
        """A model whose base was saved with it: transformers' own loading, checked."""
        with readable(folder):
            safely = {"use_safetensors": True, "trust_remote_code": False}
            told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, found = super().from_pretrained(folder, config=config, dtype=dtype, **safely, **told)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[kind]:
                name = sorted(map(str, found[kind]))[0]
                raise UserMistake(f"{folder}: {kind.replace('_', ' ')}: {name}; it belongs to another configuration")
        return model

    @classmethod
    def _with_named_base(cls, folder: Path, config: LatentReasoningConfig, base: LoadedBase) -> Self:
        """A model on a base that lies elsewhere, with the reasoner from its folder."""
        if config.reasoner is not None and config.prompt_format == "coconut":
            base = with_markers(base)
        base = with_rows(base, config.vocab_size)
        found, wanted = base.decoder.config, config.text_config
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            if getattr(found, name) != getattr(wanted, name):
                other = f"{name} is {getattr(found, name)}, not {getattr(wanted, name)}"
                raise UserMistake(f"{folder}: the base {base.name!r} is not the one it was trained on: {other}")
        config.text_config = copy.deepcopy(found)  # the base's own word counts, not the copy beside the reasoner
        config.text_config.name_or_path = ""
        model = cls.assemble(base, config)
        reasoner = {name: v for name, v in model.state_dict().items() if name.startswith(REASONER_PREFIX)}
        model.load_state_dict(read_weights(folder, reasoner), strict=False)
        return model

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a tokenizer; its chat template becomes the one that writes this model's prompts."""
        config = self.config
        self.tokenizer = copy.deepcopy(tokenizer)
        if config.reasoner and (slot := slot_token_id(self.tokenizer)) != config.slot_token_id:
            raise UserMistake(f"slot_token_id={config.slot_token_id}, but the slot of this tokenizer is {slot}")
        self.write_prompts()
        self.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=padding_token_id(tokenizer),
            suppress_tokens=[config.slot_token_id] if config.reasoner else None,
        )

    def write_prompts(self, **changes: Any) -> None:
        """Make the encoder and the chat template that the configuration says, with changes to it: `num_slots`,
        `skip_steps` and `target` go with the stage of a curriculum."""
        for name, value in changes.items():
            setattr(self.config, name, value)
        asked = picked(self.config, "target", "prompt_format", "keep_annotations", "think", "steps_from", "skip_steps")
        slots = self.config.num_latents if self.config.num_slots is None else self.config.num_slots
        self.encoder = PromptEncoder(tokenizer=self.tokenizer, num_latents=slots, **asked)
        self.tokenizer.chat_template = self.encoder.template

    def freeze_base(self) -> None:
        full = self.config.base_training == "full"
        for name, parameter in self.named_parameters():
            if ".reasoner." not in name and "lora_" not in name:
                parameter.requires_grad_(full)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write configuration, reasoner, adapter, tokenizer and card; the base only where it is nowhere else."""
        folder = Path(save_directory)
        kwargs["state_dict"] = weights_to_save(self, self.config.base_model)
        with no_progress_bars():
            super().save_pretrained(folder, *args, **kwargs)
        shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
        if adapter_layers(self.model.language_model):
            public = "" if is_local(self.config.base_model) else self.config.base_model
            save_adapter(self.model.language_model, folder / ADAPTER_FOLDER, base_model=public)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(folder))
        write_text(folder / "README.md", model_card(self.config))

    def push_to_hub(self, repo_id: str, *, private: bool = True, **kwargs: Any) -> list[str]:
        """Save to a temporary folder and upload it; see `push_model`."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_model(folder, repo_id, private=private, **kwargs)

    def merge_and_unload(self) -> Self:
        """Add the adapter into the base's weights, which are saved with the model from then on."""
        self.model.merge_and_unload()
        return self

    def unload(self) -> BaseAndTokenizer:
        """Take the adapter off, its updates lost, and hand this base on: `from_base` and `train_gsm8k` take it."""
        take_off_adapter(self.model.language_model)
        return self, self.tokenizer

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str | None = None) -> None:
        """PEFT's `add_adapter`, on the base only; the adapter is fp32, and there is one, "default"."""
        if adapter_name not in (None, "default"):
            raise UserMistake(f"adapter_name={adapter_name!r}: a model has one adapter, called 'default'")
        add_adapter(self.model.language_model, adapter_config)
        self.config.base_training = "lora"
        self.freeze_base()

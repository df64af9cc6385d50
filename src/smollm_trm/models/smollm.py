"""`SmolLMv3WithTRM`: the causal LM around the backbone, whose `generate()` is Hugging Face's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, GenerationMixin, PreTrainedTokenizerBase

from smollm_trm.data.batching import pad_left
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.models.adapters import load_adapter, take_off_adapter
from smollm_trm.models.configuration import LatentReasoningConfig, registered_for
from smollm_trm.models.generation import Completion, chosen_latents, generate_completions
from smollm_trm.models.modeling import LatentCausalLMOutput, LatentReasoningModel
from smollm_trm.models.pretrained import SavedBesideItsBase
from smollm_trm.models.reasoners.reasoner import Reasoner, Thought
from smollm_trm.records import UserMistake, check_range


@registered_for(AutoModelForCausalLM, LatentReasoningConfig)
class SmolLMv3WithTRM(SavedBesideItsBase, GenerationMixin):
    """A decoder with a latent span (SmolLM3 by default; Llama, Qwen2, Qwen3 and GPT-2 work as well).

    Make one with `from_base`, load one with `from_pretrained`.
    """

    def __init__(self, config: LatentReasoningConfig) -> None:
        if not isinstance(config, LatentReasoningConfig):
            raise UserMistake(f"SmolLMv3WithTRM({config!r:.60}): use from_base(name) or from_pretrained(folder)")
        table = "wte" if config.text_config.model_type == "gpt2" else "embed_tokens"
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{table}.weight"}
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = LatentReasoningModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.post_init()

    def active_adapters(self) -> list[str]:
        return self.model.language_model.active_adapters()

    def disable_adapters(self) -> None:
        """Let the base answer without its adapter; the latents stay."""
        self.model.language_model.disable_adapters()

    def enable_adapters(self) -> None:
        self.model.language_model.enable_adapters()

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        self.model.language_model.set_adapter(adapter_name)

    def load_adapter(self, peft_model_id: str | Path, *args: Any, **kwargs: Any) -> None:
        """Put a saved adapter, such as `adapter/` of a saved model, in the place of the one that is there."""
        take_off_adapter(self.model.language_model)
        load_adapter(self.model.language_model, Path(peft_model_id))
        self.config.base_training = "lora"
        self.freeze_base()

    def delete_adapter(self, adapter_names: str | list[str] = "default") -> None:
        """Take the adapter off, its updates with it; the base is as it was, and frozen."""
        if adapter_names not in ("default", ["default"]) or not take_off_adapter(self.model.language_model):
            raise UserMistake(f"adapter_names={adapter_names!r}: a model has one adapter at most, called 'default'")
        self.config.base_training = "frozen"
        self.freeze_base()

    @property
    def reasoner(self) -> Reasoner | None:
        """What fills the span; None for the baseline."""
        return self.model.reasoner

    @property
    def use_trm(self) -> bool:
        return self.model.reasoner is not None

    @property
    def num_latents(self) -> int:
        return self.config.num_latents

    def think(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> list[Thought]:
        """See `LatentReasoningModel.think`."""
        return self.model.think(input_ids, attention_mask, **options)

    def fit_reasoner(self, questions: Sequence[str]) -> None:
        """Let the reasoner measure the statistics it keeps, on some questions; training calls it once."""
        if self.reasoner is not None:
            rows = [self.encoder.encode_prompt(question) for question in questions]
            ids, mask = pad_left(rows, padding_token_id(self.tokenizer))
            self.model.fit_reasoner(ids.to(self.device), mask.to(self.device))

    @torch.no_grad()
    def latents_for(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, halting: bool = False, **options: Any
    ) -> Tensor:
        """Latents `(B, M, D)` for prompts with a span."""
        thoughts = self.think(input_ids, attention_mask, **options)
        no_latents = torch.zeros(len(input_ids), 0, self.config.hidden_size, device=input_ids.device)
        return chosen_latents(thoughts, halting=halting) if thoughts else no_latents

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        latents: Tensor | None = None,
        n_steps: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> LatentCausalLMOutput:
        """Logits and loss; see `LatentReasoningModel.forward` for the rest and for what thinks.

        Args:
            labels: `(B, L)`, `labels[i] == input_ids[i]` (shifted here), -100 where nothing is supervised.
            logits_to_keep: logits of the last so many columns only, 0 for all; or which columns.
            num_items_in_batch: the loss is the sum over tokens divided by this; by their number when None.
            kwargs: for the decoder.
        """
        thinking = {"inputs_embeds": inputs_embeds, "latents": latents, "n_steps": n_steps}
        if not use_cache and isinstance(logits_to_keep, int) and not kwargs.get("output_hidden_states"):
            thinking["last_columns"] = logits_to_keep
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values, "use_cache": use_cache}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **thinking, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Without .contiguous() PyTorch multiplies a slice by a batched copy of the whole table: half of a step's time.
        logits = self.lm_head(output.last_hidden_state[:, kept].contiguous())
        loss = None
        if labels is not None and not isinstance(logits_to_keep, int):
            raise UserMistake("labels need logits_to_keep as a number: the last so many columns")
        if labels is not None:
            loss = self.loss_function(
                logits, labels[:, kept], self.lm_head.out_features, num_items_in_batch=num_items_in_batch
            )
        others = {name: one for name, one in output.items() if name != "last_hidden_state"}
        return LatentCausalLMOutput(loss=loss, logits=logits, **others)

    def _prefill(self, input_ids: Tensor, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        size = generation_config.prefill_chunk_size
        if self.use_trm and size is not None and size < input_ids.shape[1]:
            raise UserMistake(f"prefill_chunk_size={size}: the latents depend on the whole prompt, leave it out")
        return super()._prefill(input_ids, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        latents: Tensor | None = None,
        n_steps: int | None = None,
        halting: bool = False,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Think once, at the first iteration, where the mask still has two dimensions."""
        if is_first_iteration and latents is None and self.use_trm and kwargs.get("inputs_embeds") is None:
            latents = self.latents_for(input_ids, kwargs.get("attention_mask"), n_steps=n_steps, halting=halting)
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )
        return {**inputs, "latents": latents} if latents is not None else inputs

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> dict:
        """Keep the latents for the next iteration, which without a cache reads the prompt again."""
        if outputs.get("latents") is not None:
            model_kwargs["latents"] = outputs["latents"]
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    def generate_with_thinking(
        self,
        prompts: str | Sequence[str | list[dict[str, str]]],
        *,
        max_new_tokens: int | None = None,
        latents_from: Sequence[str] | None = None,
        rethink: bool | None = None,
        n_steps: int | None = None,
        halting: bool = False,
        return_details: bool = False,
        **generate_kwargs: Any,
    ) -> str | list[str] | list[Completion]:
        """Answer bare questions: format, latents, `generate()`, text.

        If the model itself writes `<think>`, generation stops there, a span is appended and filled, and it goes on.

        Args:
            prompts: a question, or several; one may be a whole conversation, messages that end in a user's.
            max_new_tokens: tokens to generate at most; 256 unless a `generation_config` says otherwise.
            latents_from: other questions whose latents are put in instead (the shuffled control).
            rethink: whether a `<think>` of the model's own gets a span; None: yes, except with beams or a streamer.
            n_steps: supervision steps; all when None.
            halting: stop each row's thinking where its halting head says so.
            return_details: a `Completion` each, in place of its text.
            generate_kwargs: anything `generate()` takes.

        Returns:
            What was written after the think block, without special tokens: a text, or a list of several.

        Raises:
            UserMistake: a question too long for the context; `rethink=True` with beams or a streamer.
        """
        if self.tokenizer is None:
            raise UserMistake("this model has no tokenizer: load it with from_pretrained, or call use_tokenizer first")
        if (given := generate_kwargs.pop("generation_config", None)) is not None:
            generate_kwargs = {**given.to_diff_dict(), **generate_kwargs}
        limit = generate_kwargs.pop("max_new_tokens", 256)
        limit = limit if max_new_tokens is None else max_new_tokens
        check_range(1, max_new_tokens=limit)
        questions = [prompts] if isinstance(prompts, str) else prompts
        given = isinstance(questions, Sequence) and len(questions) > 0
        if not given or not all(isinstance(one, (str, list)) for one in questions):
            raise UserMistake(f"prompts={prompts!r:.60}: give a question, or a list of questions")
        options = {"latents_from": latents_from, "rethink": rethink, "max_new_tokens": limit}
        thinking = {"n_steps": n_steps, "halting": halting}
        found = generate_completions(self, questions, thinking=thinking, **options, **generate_kwargs)
        if return_details:
            return found
        texts = [completion.text for completion in found]
        return texts[0] if isinstance(prompts, str) and len(texts) == 1 else texts

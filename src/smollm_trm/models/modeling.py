"""A Hugging Face decoder that thinks in latent space before it answers.

    embed the prompt -> the reasoner thinks about what stands before the span -> latents into the slots -> one pass

Hugging Face's layout of vision-language models, with a reasoner where they have the vision tower. Because nothing
about the pass is special, `generate()`, every cache, every attention implementation, gradient checkpointing, PEFT and
TRL work as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from smollm_trm.models.adapters import take_off_adapter
from smollm_trm.models.blocks import refuse_too_large
from smollm_trm.models.configuration import LatentReasoningConfig, registered_for
from smollm_trm.models.prompt import Prompt, positions_of
from smollm_trm.models.reasoners.known import build_reasoner
from smollm_trm.models.reasoners.reasoner import Reasoner, Thought
from smollm_trm.models.residual import decoder_pass
from smollm_trm.models.span import fill_slots, given_slots, whole_spans
from smollm_trm.records import UserMistake

CALIBRATION_QUESTIONS = (
    "Tom has 4 bags with 6 pears in each bag. He eats 5 of the pears. How many pears does he have now?",
    "A train goes 60 miles an hour for 3 hours and then 40 miles an hour for 2 hours. How far does it go?",
    "Mia saves 15 dollars a week. How much has she saved after 8 weeks if she spends 30 dollars on a present?",
    "There are 24 children in a class. A third of them walk to school and the others take the bus. How many take it?",
)
"""What a fresh reasoner's statistics are measured on, until training measures them on its own questions."""


@dataclass
class LatentModelOutput(BaseModelOutputWithPast):
    """The decoder's output, and what was put into the slots."""

    latents: Tensor | None = None
    halting_logit: Tensor | None = None


@dataclass
class LatentCausalLMOutput(CausalLMOutputWithPast):
    """A causal LM's output, and what was put into the slots: `latents` `(B, M, D)`, `halting_logit` `(B,)`."""

    latents: Tensor | None = None
    halting_logit: Tensor | None = None


class LatentReasoningPreTrainedModel(PreTrainedModel):
    """What backbone and causal LM share."""

    config_class = LatentReasoningConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = "past_key_values"
    _keep_in_fp32_modules_strict = ["reasoner"]

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the reasoner as its constructor made it; the base initialises itself."""

    def print_trainable_parameters(self) -> None:
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")


def fresh_reasoner(config: LatentReasoningConfig) -> Reasoner | None:
    """The reasoner of a configuration, untrained; None for the baseline."""
    if config.reasoner is None:
        return None
    shape = {"hidden_size": config.hidden_size, "depth": config.num_hidden_layers, "num_latents": config.num_latents}
    with torch.device("meta"):
        refuse_too_large("the reasoner", build_reasoner(config.reasoner, config.reasoner_settings, **shape))
    return build_reasoner(config.reasoner, config.reasoner_settings, **shape)


def read_before(slots: Tensor, n_cached: int) -> int:
    """How many columns a thought's cache, which holds `n_cached` latents, shares with the rows whose spans these are;
    0 where the spans of a batch do not begin in one column."""
    counts, starts = slots.sum(1), slots.int().argmax(1)
    first = int(starts.max())
    aligned = bool((starts[counts > 0] == first).all())
    return first + min(int(counts.min()), n_cached) if aligned else 0


@registered_for(AutoModel, LatentReasoningConfig)
class LatentReasoningModel(LatentReasoningPreTrainedModel):
    """The backbone: a decoder without its head, and a reasoner that fills the latent span of a prompt."""

    def __init__(self, config: LatentReasoningConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.reasoner = fresh_reasoner(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "LatentReasoningModel":  # the base lies elsewhere
        return AutoModelForCausalLM.from_pretrained(*args, **{**kwargs, "trust_remote_code": False}).model

    def merge_and_unload(self) -> "LatentReasoningModel":
        """See `SmolLMv3WithTRM.merge_and_unload`."""
        if take_off_adapter(self.language_model, merge=True):
            self.config.base_training, self.config.base_model = "full", ""
        return self

    def prompt_before(
        self, input_ids: Tensor, attention_mask: Tensor, slots: Tensor, earlier_latents: Tensor | None = None
    ) -> Prompt:
        """What stands before the slots, moved so that all rows end in the last column; a row without slots gets none
        of what is thought, and may stand as it is."""
        starts = slots.int().argmax(1)  # (B,)
        longest = int(starts.max())
        starts = starts.masked_fill(~slots.any(1), longest)
        columns = starts[:, None] - longest + torch.arange(longest, device=starts.device)  # (B, longest)
        taken = columns.clamp_min(0)
        ids = input_ids.gather(1, taken)
        mask = attention_mask.bool().gather(1, taken) & (columns >= 0)
        embeddings = self.get_input_embeddings()(ids)
        if earlier_latents is not None:
            filled = given_slots(ids, self.config.slot_token_id, earlier_latents.shape[1])
            embeddings = fill_slots(embeddings, filled, earlier_latents)
        return Prompt(decoder=self.language_model, embeddings=embeddings, mask=mask, n_slots=slots.sum(1))

    def think(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> list[Thought]:
        """Read what stands before the span and think about it: one `Thought` per supervision step."""
        if self.reasoner is None:
            return []
        if (n_steps := options.get("n_steps")) is not None and n_steps < 1:
            raise UserMistake(f"n_steps={n_steps}: must be at least 1; all steps when None")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        slots = self.spans(input_ids)
        return self.reasoner.think(self.prompt_before(input_ids, mask, slots), **options) if bool(slots.any()) else []

    def spans(self, input_ids: Tensor) -> Tensor:
        """See `whole_spans`; under a curriculum a row may have none."""
        return whole_spans(input_ids, self.config.slot_token_id, needed=self.config.num_slots is None)

    @torch.no_grad()
    def fit_reasoner(self, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Let the reasoner measure the statistics it keeps, on some prompts `(B, L)` with their spans; no dropout."""
        if self.reasoner is None:
            return
        modes = {module: module.training for module in self.modules()}
        self.eval()
        slots = self.spans(input_ids)
        self.reasoner.fit(self.prompt_before(input_ids, attention_mask, slots))
        for module, mode in modes.items():
            module.training = mode

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        n_steps: int | None = None,
        thought: Thought | None = None,
        last_columns: int = 0,
        **kwargs: Any,
    ) -> LatentModelOutput:
        """One pass of the base with the latents in their slots.

        Args:
            input_ids: `(B, L)`; a prompt must have a latent span, what goes on from a cache has none.
            attention_mask: `(B, L)`, left- or right-padded; all real when None.
            position_ids: `(B, L)`; counted from a 2-D mask when None.
            inputs_embeds: `(B, L, D)` in place of `input_ids`; no thinking then.
            latents: `(B, M, D)` made before, in place of thinking here.
            n_steps: supervision steps to make; the last of them carries gradients. All when None.
            thought: the same as `latents`, with its cache: what that holds is not computed again.
            last_columns: how many of the last columns are wanted, 0 for all: from a cache no others are computed.

        Raises:
            UserMistake: a prompt without a span.
        """
        begin = 0
        if thought is not None:
            latents = thought.latents
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            goes_on = past_key_values is not None and (input_ids.shape[1] == 1 or past_key_values.get_seq_length() > 0)
            if self.reasoner is not None and goes_on and input_ids.shape[1] > 1:
                if bool((input_ids == self.config.slot_token_id).any()):
                    raise UserMistake("a latent span behind a filled cache: give the whole prompt with an empty cache")
            elif self.reasoner is not None and not goes_on:
                if latents is None and (thoughts := self.think(input_ids, attention_mask, n_steps=n_steps)):
                    thought = thoughts[-1]
                    latents = thought.latents
                    slots = self.spans(input_ids)
                elif latents is not None:
                    slots = given_slots(input_ids, self.config.slot_token_id, latents.shape[1])
                if latents is not None and latents.shape[1]:
                    inputs_embeds = fill_slots(inputs_embeds, slots, latents)
                if thought is not None and thought.cache is not None and past_key_values is None and last_columns:
                    begin = read_before(slots, thought.n_cached)
                    begin = begin if input_ids.shape[1] - last_columns >= begin else 0
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions_of(attention_mask)[:, -inputs_embeds.shape[1] :]
        if begin:
            if (surplus := thought.cache.get_seq_length() - begin) > 0:  # what another pass added to it
                thought.cache.crop(-surplus)
            columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            position_ids = (columns if position_ids is None else position_ids)[:, begin:]
            inputs_embeds, past_key_values = inputs_embeds[:, begin:], thought.cache
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values}
        given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        output = decoder_pass(self.language_model, **given, **kwargs)
        halting_logit = None if thought is None else thought.halting_logit
        return LatentModelOutput(**output, latents=latents, halting_logit=halting_logit)

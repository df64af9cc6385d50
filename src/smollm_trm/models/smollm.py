"""A Hugging Face decoder that thinks in latent space before it answers.

The way of one batch: a *read pass* of the base over the prompt gives hidden states, the reasoner turns them into
latents, and one ordinary pass of the base answers with the latents in their slots. Because nothing about that pass is
special, gradient checkpointing, every attention implementation, every cache and `generate()` work as they are.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from smollm_trm.data.prompts import PromptEncoder, padding_token_id, slot_token_id
from smollm_trm.hub import push_model
from smollm_trm.models.assembly import BaseAndTokenizer, ModelParts, fresh_parts, merged_parts, save_parts, saved_parts
from smollm_trm.models.generation import chosen_latents, generate_filled, generate_texts
from smollm_trm.models.loading import LoraSettings
from smollm_trm.models.output import ReasoningOutput, states_at, supervised_columns
from smollm_trm.models.reasoners import Reasoner, Thought
from smollm_trm.models.span import LatentSpan
from smollm_trm.models.storage import ModelSettings


class SmolLMv3WithTRM(nn.Module):
    """A decoder with a latent span (SmolLM3 by default; Llama, Qwen, GPT-2 work as well).

    Args:
        base_model: a Hugging Face causal LM, or the same wrapped by PEFT.
        tokenizer: of the base.
        reasoner: fills the span; None is the baseline, on `<think></think>`.
        settings: how the parts belong together.
        notes: plain values that are saved with the model, such as what was measured.
    """

    def __init__(
        self,
        *,
        base_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        reasoner: Reasoner | None,
        settings: ModelSettings,
        notes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base_model = base_model
        self.tokenizer = tokenizer
        self.reasoner = reasoner
        self.settings = settings
        self.notes = dict(notes or {})
        self.encoder = PromptEncoder(
            tokenizer=tokenizer,
            num_latents=self.num_latents,
            target=settings.target,
            prompt_format=settings.prompt_format,
            keep_annotations=settings.keep_annotations,
        )
        self.slot_id = slot_token_id(tokenizer)
        self.stand_in_id = self.encoder.encode_question("")[-1]  # `<think>`: what the base sees in place of a slot
        depth = self.config.num_hidden_layers
        n_read = min(settings.trm.n_read_layers, depth)
        self.read_layers = [round(depth * (index + 1) / n_read) for index in range(n_read)]

    @classmethod
    def from_base(
        cls,
        model_name: str | BaseAndTokenizer = "HuggingFaceTB/SmolLM3-3B",
        *,
        settings: ModelSettings | None = None,
        lora: LoraSettings | None = None,
        dtype: torch.dtype = torch.float32,
        tiny_texts: list[str] | None = None,
        seed: int = 0,
    ) -> "SmolLMv3WithTRM":
        """A base with a fresh adapter and a fresh reasoner.

        Args:
            model_name: see `load_base`, or a model and its tokenizer.
            settings: which reasoner, how many latents, and so on.
            lora: the adapter's settings.
            dtype: of the base's weights; adapter and reasoner are fp32.
            tiny_texts: see `load_base`.
            seed: of every new weight.
        """
        parts = fresh_parts(
            model_name,
            settings=settings or ModelSettings(),
            lora=lora or LoraSettings(),
            dtype=dtype,
            tiny_texts=tiny_texts,
            seed=seed,
        )
        return cls(**parts._asdict())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        model_name: str | BaseAndTokenizer | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
    ) -> "SmolLMv3WithTRM":
        """Put a saved model together again, on the base it names.

        Args:
            folder: what `save_pretrained` wrote, or a name on the Hub.
            model_name: another place of the same base, or the loaded base and its tokenizer, which stay as they are.
            dtype: of the base's weights; "auto" is bf16 or fp16 by the GPU's capability, and fp32 on a CPU.
            device: where to; "auto" is the GPU where there is one.

        Raises:
            ValueError: one line: not such a folder, a tensor missing, extra or of another shape.
        """
        return cls(**saved_parts(folder, model_name=model_name, dtype=dtype, device=device)._asdict()).eval()

    def save_pretrained(self, folder: str | Path, **extra) -> None:
        """Write adapter, reasoner, tokenizer and `smollm_trm.json`; the base only where it was trained whole.

        Args:
            folder: made if need be.
            extra: plain values to keep in `smollm_trm.json`, now and in every later save.
        """
        self.notes |= extra
        save_parts(self.parts, Path(folder))

    def push_to_hub(self, repo_id: str, *, private: bool = True, **extra) -> list[str]:
        """Save to a temporary folder and upload it, with a card that states what was measured.

        Args:
            repo_id: "owner/name".
            private: whether a new repository is private.
            extra: see `save_pretrained`.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **extra)
            return push_model(folder, repo_id, private=private)

    def tie_weights(self) -> None:
        """Nothing of ours is tied; lm-eval's wrapper asks for the base's."""
        self.causal_lm.tie_weights()

    def merge_and_unload(self) -> "SmolLMv3WithTRM":
        """The same model with the adapter added into the base's weights; the reasoner stays beside it.

        Its read pass then has the adapter in it, so `read_with_adapter=False` is refused.
        """
        return type(self)(**merged_parts(self.parts)._asdict())

    @property
    def parts(self) -> ModelParts:
        """What the model is made of."""
        return ModelParts(self.base_model, self.tokenizer, self.reasoner, self.settings, self.notes)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model itself, inside PEFT's wrapper or not."""
        return self.base_model.get_base_model() if hasattr(self.base_model, "get_base_model") else self.base_model

    @property
    def config(self) -> PretrainedConfig:
        """The base's configuration."""
        return self.causal_lm.config

    @property
    def device(self) -> torch.device:
        """Where the base's embedding table is."""
        return self.causal_lm.get_input_embeddings().weight.device

    @property
    def use_trm(self) -> bool:
        """Whether there is a latent span."""
        return self.reasoner is not None

    @property
    def num_latents(self) -> int:
        """M; 0 for the baseline."""
        return self.reasoner.num_latents if self.reasoner is not None else 0

    def span_of(self, input_ids: Tensor, attention_mask: Tensor) -> LatentSpan:
        """Where the slots of a batch stand; nowhere for the baseline."""
        if self.reasoner is None:
            return LatentSpan(torch.zeros_like(input_ids, dtype=torch.bool))
        return LatentSpan.find(input_ids, attention_mask, self.slot_id)

    def embed(self, input_ids: Tensor, span: LatentSpan) -> Tensor:
        """The base's embeddings `(B, L, D)`; slots may have ids that its table does not hold."""
        return self.causal_lm.get_input_embeddings()(input_ids.masked_fill(span.slots, self.stand_in_id))

    def read(self, prompt_ids: Tensor, attention_mask: Tensor, earlier_latents: Tensor | None = None) -> list[Tensor]:
        """Hidden states of the prompt, without gradient: the layers in `read_layers`, each `(B, L, D)`.

        Args:
            prompt_ids: `(B, L)`, up to and including `<think>`.
            attention_mask: `(B, L)`.
            earlier_latents: `(B, S * M, D)` of S spans that already stand in the prompt.
        """
        adapter_off = not self.settings.read_with_adapter and hasattr(self.base_model, "disable_adapter")
        with torch.no_grad(), self.base_model.disable_adapter() if adapter_off else nullcontext():
            span = self.span_of(prompt_ids, attention_mask)
            embeddings = self.embed(prompt_ids, span)
            if earlier_latents is not None:
                embeddings = span.fill(embeddings, earlier_latents)
            return states_at(
                self.causal_lm.base_model,
                self.read_layers,
                inputs_embeds=embeddings,
                attention_mask=attention_mask,
                position_ids=span.positions(attention_mask),
                use_cache=False,
            )

    def think(self, input_ids: Tensor, attention_mask: Tensor, **options) -> list[Thought]:
        """Read what stands before the span and think about it: one `Thought` per supervision step.

        Args:
            input_ids: `(B, L)` rows with a span in the same columns; what follows the span is not looked at.
            attention_mask: `(B, L)`.
            options: `n_steps` and `gradient_at_every_step`, see `Reasoner.think`.

        Returns:
            An empty list for the baseline, which has nothing to think with.
        """
        if self.reasoner is None:
            return []
        start, _ = self.span_of(input_ids, attention_mask).columns()
        question_mask = attention_mask[:, :start]
        hidden_states = self.read(input_ids[:, :start], question_mask)
        return self.reasoner.think(hidden_states, question_mask.bool(), **options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        n_steps: int | None = None,
        thought: Thought | None = None,
    ) -> ReasoningOutput:
        """One pass over prompts with their completions.

        Args:
            input_ids: `(B, L)`: left-padded prompts whose spans stand in the same columns, right-padded completions.
            attention_mask: `(B, L)`; all real when None.
            labels: `(B, L)`, -100 where nothing is supervised. Logits are computed only where labels begin.
            n_steps: supervision steps to make; the last of them carries gradients. All when None.
            thought: latents made before, in place of thinking here.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        span = self.span_of(input_ids, attention_mask)
        embeddings = self.embed(input_ids, span)
        if self.reasoner is not None:
            start, end = span.columns()
            if thought is None:
                thought = self.think(input_ids, attention_mask, n_steps=n_steps)[-1]
            latents = thought.latents.to(embeddings.dtype)
            embeddings = torch.cat([embeddings[:, :start], latents, embeddings[:, end:]], dim=1)
        keep = supervised_columns(labels)
        logits = self.base_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=span.positions(attention_mask),
            logits_to_keep=keep,
            use_cache=False,
        ).logits
        if labels is not None:
            logits, labels = logits[:, :-1], labels[:, labels.shape[1] - keep + 1 :]
        return ReasoningOutput(logits, labels, thought and thought.latents, thought and thought.halting_logit)

    def latents_for(
        self, input_ids: Tensor, attention_mask: Tensor, *, n_steps: int | None = None, halting: bool = False
    ) -> Tensor:
        """Latents `(B, M, D)` for prompts that end in a span.

        Args:
            input_ids: `(B, L)`, left-padded.
            attention_mask: `(B, L)`.
            n_steps: supervision steps; all when None.
            halting: take each row's first step at which its halting head says stop, instead of the last.
        """
        return chosen_latents(self.think(input_ids, attention_mask, n_steps=n_steps), halting=halting)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        n_steps: int | None = None,
        halting: bool = False,
        **generate_kwargs,
    ) -> Tensor:
        """Hugging Face's `generate()` of the base, conditioned on latents.

        Args:
            input_ids: `(B, L)` prompts that end in a span (`PromptEncoder.encode_prompt`), left-padded.
            attention_mask: `(B, L)`; without it, padding is what equals the padding token.
            latents: `(B, M, D)` in place of thinking here.
            n_steps: see `latents_for`.
            halting: see `latents_for`.
            generate_kwargs: anything `generate()` takes; greedy unless `do_sample=True`.

        Returns:
            `(B, L + new)` ids, prompt included, as `generate()` does.
        """
        if attention_mask is None:
            attention_mask = (input_ids != padding_token_id(self.tokenizer)).long()
        if latents is None and self.use_trm:
            latents = self.latents_for(input_ids, attention_mask, n_steps=n_steps, halting=halting)
        return generate_filled(self, input_ids, attention_mask, latents, generate_kwargs)

    def generate_with_thinking(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 256,
        latents_from: Sequence[str] | None = None,
        rethink: bool | None = None,
        n_steps: int | None = None,
        halting: bool = False,
        **generate_kwargs,
    ) -> str | list[str]:
        """Answer bare questions: format, latents, `generate()`, text.

        If the model itself writes `<think>`, generation stops there, a span is appended and filled, and it goes on.

        Args:
            prompts: one question or several.
            max_new_tokens: tokens to generate at most.
            latents_from: other questions whose latents are put in instead (the shuffled control).
            rethink: whether a `<think>` of the model's own gets a span; None: yes, except with beams or a streamer.
            n_steps: supervision steps; all when None.
            halting: stop each row's thinking where its halting head says so.
            generate_kwargs: anything `generate()` takes; greedy unless `do_sample=True`.

        Returns:
            What was written after the think block, without special tokens: a text, or a list of several.

        Raises:
            ValueError: a question too long for the context; `rethink=True` with beams or a streamer.
        """
        questions = [prompts] if isinstance(prompts, str) else list(prompts)
        options = {"latents_from": latents_from, "rethink": rethink, "n_steps": n_steps, "halting": halting}
        texts = generate_texts(self, questions, max_new_tokens=max_new_tokens, **options, **generate_kwargs)
        return texts[0] if isinstance(prompts, str) and len(texts) == 1 else texts

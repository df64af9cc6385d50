"""Tiny twins of the decoders that must work, and rows to try them on."""

from copy import deepcopy
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from smollm_trm.data.batching import collate_examples
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.data.word_problems import generate_word_problems
from smollm_trm.models.adapters import LoraSettings
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.tiny import build_tiny_model, train_tiny_tokenizer

ARCHITECTURES = ("smollm3", "llama", "qwen2", "qwen3", "gpt2")
ROWS = generate_word_problems(count=60, seed=5)
SMALL_TRM = {
    "n_layers": 1,
    "n_heads": 2,
    "n_latent_steps": 2,
    "n_deep_recursions": 2,
    "n_supervision_steps": 2,
    "compression_heads": 2,
}
SMALL = {"trm": SMALL_TRM, "compressor": {"compression_heads": 2}}
"""Settings of a reasoner that fit a twin; the others need none."""
MODELS: dict[str, SmolLMv3WithTRM] = {}
"""Models made before, of which tests get copies: a copy takes a quarter of the time."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tiny_tokenizer([f"{row['question']} {row['answer']}" for row in ROWS])


def make_base(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A base in memory, under a name that the Hub does not know."""
    base = nameless_base(architecture, tokenizer)
    base.config.name_or_path = f"twins/{architecture}"
    return base


def nameless_base(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shape = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    decoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(1)
    if architecture == "smollm3":
        return build_tiny_model(tokenizer, hidden_size=32, n_layers=4, n_heads=4, intermediate_size=48)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, **decoder, num_key_value_heads=2, max_position_embeddings=512))
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape, **decoder, num_key_value_heads=2, max_position_embeddings=512))
    if architecture == "qwen3":
        config = Qwen3Config(**shape, **decoder, head_dim=8, num_key_value_heads=2, max_position_embeddings=512)
        return Qwen3ForCausalLM(config)
    gpt2 = GPT2Config(
        **shape, n_embd=32, n_layer=3, n_head=4, n_positions=512, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
    )
    return GPT2LMHeadModel(gpt2)


def make_model(architecture: str, tokenizer: PreTrainedTokenizerFast, **config: Any) -> SmolLMv3WithTRM:
    """A model whose adapter is not at its (neutral) start, so that a broken path shows."""
    config = {"reasoner": "trm", "num_latents": 6, "target": "answer", **config}
    config.setdefault("reasoner_settings", SMALL.get(config["reasoner"]))
    key = repr((architecture, id(tokenizer), sorted(config.items())))
    if key not in MODELS:
        MODELS[key] = fresh_model(architecture, tokenizer, config)
    torch.manual_seed(1)  # what a test draws does not depend on the tests before
    return deepcopy(MODELS[key], {id(tokenizer): tokenizer})


def fresh_model(architecture: str, tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]) -> SmolLMv3WithTRM:
    base = make_base(architecture, tokenizer)
    model = SmolLMv3WithTRM.from_base((base, tokenizer), lora=LoraSettings(dropout=0.0), **config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_batch(model: SmolLMv3WithTRM, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    return collate_examples([model.encoder.encode(row) for row in rows], padding_token_id(model.tokenizer))

"""fp16 without overflow: a base whose residual stream leaves fp16's range computes, trains and generates."""

import pytest
import torch
from transformers import PreTrainedModel
from twins import ROWS, SMALL_TRM, make_base, make_batch, make_tokenizer

from smollm_trm.models.smollm import SmolLMv3WithTRM

TOKENIZER = make_tokenizer()
QUESTIONS = [row["question"] for row in ROWS[:3]]


def loud_base(dtype: torch.dtype) -> PreTrainedModel:
    """A twin whose attention adds 5.6e4 to one dimension in every block: each product fits fp16, their sum does not."""
    base = make_base("smollm3", TOKENIZER)
    with torch.no_grad():
        base.model.embed_tokens.weight[:, 0] = 1.0  # so that the normed state is large in that dimension
        for layer in base.model.layers:
            for matrix in (layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight):
                matrix[0] = 0.0
                matrix[0, 0] = 100.0
            layer.mlp.down_proj.weight.mul_(1e4)
    return base.to(dtype)


def loud_model(dtype: torch.dtype = torch.float16) -> SmolLMv3WithTRM:
    torch.manual_seed(0)
    options = {"num_latents": 4, "reasoner_settings": SMALL_TRM, "target": "answer"}
    return SmolLMv3WithTRM.from_base((loud_base(dtype), TOKENIZER), **options).eval()


def test_plain_fp16_overflows_on_this_base_and_this_model_does_not():
    batch = {**make_batch(loud_model(torch.float32), ROWS[:3])}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    plain = loud_base(torch.float16).eval()
    assert not plain(input_ids=ids, attention_mask=mask).logits.isfinite().all()
    half, whole = loud_model()(**batch), loud_model(torch.float32)(**batch)
    assert half.logits.isfinite().all() and half.latents.isfinite().all()
    assert half.logits.dtype == torch.float16
    assert (half.loss - whole.loss).abs() < 0.02 * whole.loss


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_generates_with_every_cache(cache, autocast):
    model = loud_model()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        texts = model.generate_with_thinking(QUESTIONS, max_new_tokens=4, cache_implementation=cache)
    assert texts == model.generate_with_thinking(QUESTIONS, max_new_tokens=4, use_cache=False)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_under_autocast_with_finite_gradients(checkpointing):
    model = loud_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.float16):
        loss = model(**make_batch(model, ROWS[:3])).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 8 and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("reasoner", ["compressor", "coconut"])
def test_every_way_of_reading_the_prompt_stays_finite(reasoner):
    base = (loud_base(torch.float16), TOKENIZER)
    settings = {"compression_heads": 2} if reasoner == "compressor" else {}
    model = SmolLMv3WithTRM.from_base(base, num_latents=2, reasoner=reasoner, reasoner_settings=settings)
    assert model.eval()(**make_batch(model, ROWS[:2])).logits.isfinite().all()


def test_gpt2_which_was_made_for_fp16_computes_as_before():
    base = (make_base("gpt2", TOKENIZER).half(), TOKENIZER)
    model = SmolLMv3WithTRM.from_base(base, num_latents=2, reasoner_settings=SMALL_TRM).eval()
    assert model(**make_batch(model, ROWS[:2])).logits.isfinite().all()

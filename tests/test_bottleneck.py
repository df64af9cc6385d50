"""The latents alone can carry the reasoning.

The completion is kept from looking at the question: whatever the model answers, it has from the latents. A model that
answers an easy held-out set then, and falls to chance when latents are swapped between problems, thinks with them.
"""

import random

import torch

from smollm_trm.data.batching import collate_examples, pad_left
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.models.generation import encode_prompts
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.tiny import build_tiny_model, train_tiny_tokenizer

NAMES = ("Ann", "Ben", "Eva", "Leo", "Max", "Zoe")


def easy_problem(rng: random.Random) -> dict[str, str]:
    """Two people with a number each; the answer is the sum."""
    (one, two), first, second = rng.sample(NAMES, 2), rng.randrange(3), rng.randrange(3)
    question = f"{one} has {first} and {two} {second}."
    return {"question": question, "answer": f"#### {first + second}"}


def without_the_question(model: SmolLMv3WithTRM, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The attention mask with everything before the span hidden."""
    is_slot = input_ids == model.config.slot_token_id
    return mask * (is_slot.cumsum(1) > 0)


def share_right(model: SmolLMv3WithTRM, rows: list[dict[str, str]], *, shift: int) -> float:
    """Share of problems answered from the latents of the problem `shift` rows on."""
    questions = [row["question"] for row in rows]
    ids, mask = encode_prompts(model.encoder, questions, max_new_tokens=4, context_length=512)
    latents = model.latents_for(ids, mask).roll(-shift, 0)
    hidden = without_the_question(model, ids, mask)
    written = model.generate(ids, attention_mask=hidden, latents=latents, max_new_tokens=4)[:, ids.shape[1] :]
    texts = model.tokenizer.batch_decode(written, skip_special_tokens=True)
    return sum(text.strip() == row["answer"] for text, row in zip(texts, rows, strict=True)) / len(rows)


def test_with_the_question_hidden_the_latents_answer_and_swapped_latents_do_not():
    torch.manual_seed(0)
    rng = random.Random(0)
    rows = list({row["question"]: row for row in (easy_problem(rng) for _ in range(3000))}.values())
    held_out, train = rows[:100], rows[100:]
    tokenizer = train_tiny_tokenizer([f"Question: {row['question']} Answer: {row['answer']}" for row in train])
    trm = {
        "n_layers": 1,
        "n_heads": 4,
        "n_latent_steps": 2,
        "n_deep_recursions": 1,
        "n_supervision_steps": 2,
        "compression_heads": 4,
    }
    model = SmolLMv3WithTRM.from_base(
        (build_tiny_model(tokenizer, hidden_size=64, n_layers=2, intermediate_size=128), tokenizer),
        base_training="full",
        num_latents=4,
        target="answer",
        reasoner_settings=trm,
    )
    steps = 200
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    encoded = [model.encoder.encode(row) for row in train]
    for _ in range(steps):
        batch = collate_examples(rng.sample(encoded, 32), padding_token_id(tokenizer))
        latents = model.think(batch["input_ids"], batch["attention_mask"], n_steps=rng.randint(1, 2))[-1].latents
        batch["attention_mask"] = without_the_question(model, batch["input_ids"], batch["attention_mask"])
        loss = model(**batch, latents=latents).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    own, swapped = share_right(model, held_out, shift=0), share_right(model, held_out, shift=1)
    chance = sum(a["answer"] == b["answer"] for a, b in zip(held_out, held_out[1:], strict=False)) / len(held_out)
    assert own >= 0.95, f"answered {own:.0%} from the latents"
    assert swapped <= chance + 0.1, f"answered {swapped:.0%} from another problem's latents, chance is {chance:.0%}"


def test_hiding_the_question_really_hides_it():
    """The control of the test above: without latents nothing about the question gets through."""
    rows = [{"question": f"Ann {n} Ben 3 Ann", "answer": "#### 1"} for n in (1, 7)]
    tokenizer = train_tiny_tokenizer([row["question"] for row in rows])
    model = SmolLMv3WithTRM.from_base(
        (build_tiny_model(tokenizer, hidden_size=32, n_layers=2), tokenizer),
        num_latents=3,
        reasoner="static",
        target="answer",
    ).eval()
    ids, mask = pad_left([model.encoder.encode_prompt(row["question"]) for row in rows], 0)
    first, second = model(ids, attention_mask=without_the_question(model, ids, mask)).logits[:, -1]
    assert torch.equal(first, second)

"""TRL trains the model as it is: no line of ours between its trainers and the reasoner."""

import warnings

import pytest
import torch
from twins import ROWS, make_model, make_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERE = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "bf16": False}


def rows_for_sft(kind: str, model) -> Dataset:
    rows = []
    for row in ROWS[:4]:
        completion = model.encoder.completion_text(row["answer"])
        asked, told = {"role": "user", "content": row["question"]}, {"role": "assistant", "content": completion}
        if kind == "text":
            rows.append({"prompt": model.encoder.prompt_text(row["question"]), "completion": completion})
        else:
            rows.append({"prompt": [asked], "completion": [told]} if kind == "chat" else {"messages": [asked, told]})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
@pytest.mark.parametrize("kind", ["text", "chat", "messages"])
def test_sft_trains_the_reasoner_on_its_own_prompts(tmp_path, kind, prompt_format, caplog):
    model = make_model("smollm3", TOKENIZER, prompt_format=prompt_format)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = SFTConfig(str(tmp_path), per_device_train_batch_size=4, max_steps=1, learning_rate=1e-2, **HERE)
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=rows_for_sft(kind, model), processing_class=model.tokenizer
    )
    [batch] = list(trainer.get_train_dataloader())
    encoded = {tuple(example.prompt + example.completion) for example in map(model.encoder.encode, ROWS[:4])}
    seen = {
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert seen == encoded, "what TRL trains on is what the encoder writes"
    result = trainer.train()
    assert 0 < result.training_loss < 20
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("recursion" in name for name in moved) and any("compressor" in name for name in moved)
    assert all("reasoner" in name or "lora_" in name for name in moved)
    assert "Mismatch" not in caplog.text


def test_grpo_trains_the_reasoner_over_a_frozen_base(tmp_path):
    model = make_model("smollm3", TOKENIZER, base_training="frozen")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        max_steps=4,
        beta=0.0,
        learning_rate=1e-2,
        **HERE,
    )
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} for row in ROWS[:8]])
    rewarded = []

    def reward(completions, completion_ids, **_) -> list[float]:
        rewarded.extend(completion_ids)
        return [float(sum(ids)) % 7 for ids in completion_ids]

    trainer = GRPOTrainer(
        model=model, args=settings, train_dataset=prompts, processing_class=model.tokenizer, reward_funcs=reward
    )
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("recursion" in name for name in moved) and all("reasoner" in name for name in moved)
    assert len(rewarded) == 16 and not any(model.config.slot_token_id in ids for ids in rewarded)

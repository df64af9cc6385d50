"""A training step on a real pretrained base against a bare forward and backward on the same tokens.

    python benchmarks/real_step.py [--rows 16] [--rounds 5] [--dtype bf16] [--record]

SmolLM2-135M, real GSM8K questions answered at once, LoRA r 16 with dropout 0.1, one thread, CPU-seconds. *Bare* is
Hugging Face's model under PEFT's LoRA with labels: logits at every column, no latents, no loop. A twin with a small
vocabulary cannot show what this does: half of a step once was a hidden copy of the 49,152-row table.
"""

import time

import torch
from _models import as_text, over_rounds
from _record import benchmark_options, print_table, record
from _smollm2 import real_gsm8k, smollm2_folder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from smollm_trm.data.batching import collate_examples, supervised_columns
from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.models.adapters import ATTENTION_PROJECTIONS
from smollm_trm.models.smollm import SmolLMv3WithTRM

ARMS = {
    "LoRA": {"reasoner": None},
    "LoRA + static, M = 16": {"reasoner": "static", "num_latents": 16},
    "LoRA + TRM, M = 16": {"reasoner": "trm", "num_latents": 16},
    "LoRA + TRM, M = 64": {"reasoner": "trm", "num_latents": 64},
}


def cpu_seconds(model: torch.nn.Module, batch: dict, *, autocast: bool, **options) -> float:
    """One forward and backward."""
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch, use_cache=False, **options).loss
    loss.backward()
    model.zero_grad()
    return time.process_time() - started


def main() -> None:
    """Measure the arms in turns."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--rows", type=int, default=16, help="problems of a batch")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each arm that are timed")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the base, and of autocast")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    folder, rows = str(smollm2_folder()), load_gsm8k(real_gsm8k()).gsm8k_train[: options.rows]
    arms = {}
    for name, config in ARMS.items():
        model = SmolLMv3WithTRM.from_base(folder, target="answer", dtype=dtype, **config).train()
        examples = [model.encoder.encode(row) for row in rows]
        batch = collate_examples(examples, padding_token_id(model.tokenizer))
        arms[name] = model, batch, {"logits_to_keep": supervised_columns(batch["labels"])}
    bare = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=list(ATTENTION_PROJECTIONS))
    arms = {"bare": (get_peft_model(bare, lora).train(), arms["LoRA"][1], {}), **arms}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(options.rounds + 1):
        for name, (model, batch, given) in arms.items():
            taken = cpu_seconds(model, batch, autocast=options.dtype == "bf16", **given)
            if number:  # the first warms up
                seconds[name].append(taken)
    ratios = {
        name: over_rounds([own / base for own, base in zip(values, seconds["bare"], strict=True)])
        for name, values in seconds.items()
    }
    table = [[name, as_text(over_rounds(seconds[name]), " s"), as_text(ratio)] for name, ratio in ratios.items()]
    print_table(["arm", "CPU-seconds a step", "times the bare one"], table)
    columns = int(arms["bare"][1]["input_ids"].shape[1])
    figures = {"dtype": options.dtype, "rows": options.rows, "columns": columns, "threads": 1}
    figures |= {"cpu_seconds": {name: over_rounds(values) for name, values in seconds.items()}, "ratios": ratios}
    record("real_step", figures, keep=options.record)


if __name__ == "__main__":
    main()

"""A training step of LoRA + TRM against LoRA only, ours and TRL's `SFTTrainer`, on the same rows.

    python benchmarks/training_step.py [--num_latents 16 64 256] [--trm_dim 128] [--threads 2]

The base is SmolLM3's class, large enough to dominate the step. Every arm trains LoRA (r 16; q, k, v, o; dropout 0.1) in
fp32 for one epoch over the same 128 rows, 8 a step, in one process; the arms take turns. The rows are 16 of the 50
batches into which the loader groups 400 rows, so that our grouping by length is neither helped nor hindered by taking
few; one step in 16 also trains the halting head. Ours runs as `train_gsm8k` does (Lightning, EMA, schedule, logs);
TRL's with its own collator and trainer, with rows in random order (its default), and in our batches (its grouping by
length, which needs more rows than these to work, would make such batches).
"""

import tempfile
import time
import warnings
from pathlib import Path

import torch
from _models import Rows, as_text, gsm8k_like_rows, over_rounds, save_sized_base, time_training, trm_in_heads_of_32
from _record import benchmark_options, print_table, record
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from smollm_trm.data.batching import IGNORED_LABEL
from smollm_trm.data.prompts import PromptEncoder
from smollm_trm.models.adapters import ATTENTION_PROJECTIONS, LoraSettings

BATCH_SIZE = 8
STRETCH = 50  # batches that the loader groups together
SHAPE = {"hidden_size": 512, "n_layers": 8, "n_heads": 8, "intermediate_size": 1408}


def spread_batches(rows: Rows, encoder: PromptEncoder, *, n_batches: int) -> Rows:
    """Rows of `n_batches` of the batches of similar length into which the loader cuts these, evenly over lengths."""
    by_length = sorted(rows, key=lambda row: len(encoder.encode(row)))
    batches = [by_length[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    every = len(batches) / n_batches
    return [row for index in range(n_batches) for row in batches[int((index + 0.5) * every)]]


class TRLClock(TrainerCallback):
    """CPU seconds from the first step to the end of the last."""

    def __init__(self) -> None:
        self.started: float | None = None
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start with the first step."""
        if self.started is None:
            self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop after this step, unless another comes."""
        self.seconds = time.process_time() - self.started


def time_trl(rows: Rows, *, model_name: str, sampling: str) -> float:
    """CPU seconds of one epoch of TRL's trainer over the rows, on the prompts and completions of our LoRA-only arm."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    encoder, lora, clock = PromptEncoder(tokenizer=tokenizer, num_latents=0), LoraSettings(), TRLClock()
    texts = [
        {"prompt": encoder.prompt_text(row["question"]), "completion": encoder.completion_text(row["answer"])}
        for row in rows
    ]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = SFTConfig(
            output_dir=folder, per_device_train_batch_size=BATCH_SIZE, num_train_epochs=1, max_length=None,
            completion_only_loss=True, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, train_sampling_strategy=sampling,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_name),
            args=settings,
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(ATTENTION_PROJECTIONS),
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )  # fmt: skip
        check_same_tokens(trainer, encoder, rows)
        trainer.train()
    return clock.seconds


def check_same_tokens(trainer: SFTTrainer, encoder: PromptEncoder, rows: Rows) -> None:
    """Both sides must train on the same token ids with the same of them supervised."""
    for theirs, row in zip(trainer.train_dataset, rows, strict=True):
        ours = encoder.encode(row)
        assert list(theirs["input_ids"]) == ours.prompt + ours.completion, "TRL trains on other tokens"
        labels = [IGNORED_LABEL] * len(ours.prompt) + ours.completion
        assert list(theirs["labels"]) == labels, "TRL supervises other tokens"


def main() -> None:
    """Let every arm train in turn, several rounds."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--num_latents", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--trm_dim", type=int, default=128, help="width of the TRM; 128 of 512 is 512 of 2048")
    parser.add_argument(
        "--n_batches", type=int, default=16, help="steps of an arm per round; 16 hold one for the halting head"
    )
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=1, help="rounds in which every arm takes a turn")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    rows, source = gsm8k_like_rows(4000)
    with tempfile.TemporaryDirectory() as folder:
        base = save_sized_base(Path(folder), rows, vocabulary=options.vocabulary, **SHAPE)
        encoder = PromptEncoder(tokenizer=AutoTokenizer.from_pretrained(base), num_latents=0)
        chosen = spread_batches(rows[: STRETCH * BATCH_SIZE], encoder, n_batches=options.n_batches)
        n_tokens = sum(len(encoder.encode(row).completion) for row in chosen)

        def ours(**settings) -> float:
            clock = time_training(chosen, model_name=base, batch_size=BATCH_SIZE, **settings)
            assert clock.tokens == n_tokens, f"{clock.tokens} supervised tokens instead of {n_tokens}"
            return clock.seconds

        trm = {"trm_kwargs": trm_in_heads_of_32(options.trm_dim)}
        arms = {
            "TRL, LoRA": lambda: time_trl(chosen, model_name=base, sampling="random"),
            "TRL, LoRA, grouped by length": lambda: time_trl(chosen, model_name=base, sampling="sequential"),
            "LoRA": lambda: ours(use_trm=False),
            **{f"LoRA + TRM, M={m}": lambda m=m: ours(num_latents=m, **trm) for m in options.num_latents},
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.repeats):
            for name, train in arms.items():
                seconds[name].append(train())
                print(f"{name}: {seconds[name][-1]:.1f} CPU-s", flush=True)
    figures = {
        name: {
            "samples_per_second": over_rounds([len(chosen) / taken for taken in own]),
            "supervised_tokens_per_second": over_rounds([n_tokens / taken for taken in own]),
            "time_against_trl": over_rounds([a / b for a, b in zip(own, seconds["TRL, LoRA"], strict=True)]),
            "time_against_grouped_trl": over_rounds(
                [a / b for a, b in zip(own, seconds["TRL, LoRA, grouped by length"], strict=True)]
            ),
            "time_against_our_lora": over_rounds([a / b for a, b in zip(own, seconds["LoRA"], strict=True)]),
        }
        for name, own in seconds.items()
    }
    head = ["arm", "samples/s", "supervised tokens/s", "time / TRL", "time / TRL grouped", "time / our LoRA"]
    print_table(head, [[name, *map(as_text, figure.values())] for name, figure in figures.items()])
    setup = {"rows": source, "n_rows": len(chosen), "batch_size": BATCH_SIZE, "trm_dim": options.trm_dim,
             "base": {**SHAPE, "vocabulary": options.vocabulary}, "threads": options.threads}  # fmt: skip
    record("training_step", {**setup, "arms": figures}, seed=0, keep=options.record)


if __name__ == "__main__":
    main()

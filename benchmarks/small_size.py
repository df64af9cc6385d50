"""Training rows and evaluated problems per CPU-second at a small size, one thread.

    python benchmarks/small_size.py [--widths 128 64 32] [--repeats 2]

4 layers, hidden 128, vocabulary 4,096, batch 2, n 4, T 2, four supervision steps, M 256, fp32. An earlier
implementation trained 2.0 rows per CPU-second there, 13 with its TRM switched off, and answered 2.9 problems per
CPU-second (greedy, 200 new tokens). The TRM's cost hangs on its width and on its heads (over 256 latents, attention
costs as much for a head of 4 numbers as for one of 32): besides the default, widths are measured in heads of 32.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _models import (
    Rows,
    as_text,
    gsm8k_like_rows,
    over_rounds,
    save_sized_base,
    time_training,
    trm_in_heads_of_32,
)
from _record import benchmark_options, print_table, record

from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.models.smollm import SmolLMv3WithTRM

SHAPE = {"hidden_size": 128, "n_layers": 4, "n_heads": 4, "intermediate_size": 384}
NUM_LATENTS = 256
NEW_TOKENS = 200


def evaluated_per_second(rows: Rows, base: str, trm: dict[str, Any] | None, *, batch_size: int) -> float:
    """Problems per CPU-second, every answer of full length, since random weights end their texts by chance."""
    kind = None if trm is None else "trm"
    config = {"reasoner": kind, "num_latents": NUM_LATENTS, "reasoner_settings": trm}
    model = SmolLMv3WithTRM.from_base(base, **config).eval()
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "progress": False}
    started = time.process_time()
    evaluate_gsm8k(model, rows, batch_size=batch_size, **options)
    return len(rows) / (time.process_time() - started)


def main() -> None:
    """Train and evaluate every arm in turn, several rounds."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 64, 32], help="of the TRM")
    parser.add_argument(
        "--train_rows", type=int, default=32, help="per arm and round; 32 hold one step for the halting head in 16"
    )
    parser.add_argument("--test_rows", type=int, default=64, help="problems that an arm answers per round")
    parser.add_argument("--batch_size", type=int, default=64, help="of the evaluation")
    parser.add_argument("--repeats", type=int, default=2, help="rounds in which every arm takes a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, source = gsm8k_like_rows(4000)
    arms: dict[str, dict[str, Any] | None] = {"LoRA": None, "LoRA + TRM, default": {}}
    for width in options.widths:
        arms[f"LoRA + TRM, width {width}"] = trm_in_heads_of_32(width)
    trained: dict[str, list[float]] = {name: [] for name in arms}
    evaluated: dict[str, list[float]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as folder:
        base = save_sized_base(Path(folder), rows, vocabulary=4096, **SHAPE)
        for _ in range(options.repeats):
            for name, trm in arms.items():
                span = {"use_trm": False} if trm is None else {"num_latents": NUM_LATENTS, "trm_kwargs": trm}
                clock = time_training(rows[: options.train_rows], model_name=base, batch_size=2, **span)
                trained[name].append(clock.rows / clock.seconds)
                held_out = rows[-options.test_rows :]
                evaluated[name].append(evaluated_per_second(held_out, base, trm, batch_size=options.batch_size))
                print(f"{name}: {trained[name][-1]:.1f} trained, {evaluated[name][-1]:.1f} evaluated", flush=True)
    figures = {
        name: {"trained_rows": over_rounds(trained[name]), "evaluated_problems": over_rounds(evaluated[name])}
        for name in arms
    }
    print_table(
        ["arm", "training rows / CPU-s", "evaluated problems / CPU-s"],
        [[name, *map(as_text, figure.values())] for name, figure in figures.items()],
    )
    setup = {"rows": source, "num_latents": NUM_LATENTS, "new_tokens": NEW_TOKENS, "batch_size": 2,
             "eval_batch_size": options.batch_size, "base": {**SHAPE, "vocabulary": 4096}, "threads": 1}  # fmt: skip
    record("small_size", {**setup, "arms": figures}, seed=0, keep=options.record)


if __name__ == "__main__":
    main()

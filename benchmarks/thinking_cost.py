"""What thinking costs in generation: with latents against the same base without them, in percent.

    python benchmarks/thinking_cost.py [--num_latents 16 64 256] [--repeats 3]

Greedy, a batch of questions of GSM8K, 100 new tokens for each (the mean gold answer has 100), fp32, at a size where the
base dominates and at a small one. The TRM is a quarter as wide as the base, as 512 is of SmolLM3's 2,048, in heads of
32; `--trm_dim` fixes another width.
"""

import tempfile
import time
from pathlib import Path

import torch
from _models import as_text, gsm8k_like_rows, over_rounds, save_sized_base, trm_in_heads_of_32
from _record import benchmark_options, print_table, record

from smollm_trm.models.smollm import SmolLMv3WithTRM

SIZES = {
    "8 layers, hidden 512": {"hidden_size": 512, "n_layers": 8, "n_heads": 8, "intermediate_size": 1408},
    "4 layers, hidden 128": {"hidden_size": 128, "n_layers": 4, "n_heads": 4, "intermediate_size": 384},
}


def build_arms(folder: Path, *, num_latents: list[int], trm_dim: int) -> dict[str, SmolLMv3WithTRM]:
    """The base without latents, and with so many."""
    common = {"base_training": "frozen"}
    arms = {"no latents": SmolLMv3WithTRM.from_base(str(folder), reasoner=None, **common).eval()}
    for count in num_latents:
        latents = {"num_latents": count, "reasoner_settings": trm_in_heads_of_32(trm_dim)}
        arms[f"M={count}"] = SmolLMv3WithTRM.from_base(str(folder), **latents, **common).eval()
    return arms


def main() -> None:
    """Let every arm generate in turn, several rounds, at both sizes."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--num_latents", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--trm_dim", type=int, default=None, help="width of the TRM, not a quarter of the base's")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, source = gsm8k_like_rows(2000)
    questions = [row["question"] for row in rows[: options.batch_size]]
    length = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}
    figures: dict[str, dict[str, dict]] = {}
    for size, shape in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            save_sized_base(Path(folder), rows, vocabulary=4096, **shape)
            dim = options.trm_dim or shape["hidden_size"] // 4
            arms = build_arms(Path(folder), num_latents=options.num_latents, trm_dim=dim)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.repeats):
            for name, model in arms.items():
                started = time.process_time()
                model.generate_with_thinking(questions, rethink=False, **length)
                seconds[name].append(time.process_time() - started)
        bare = seconds["no latents"]
        figures[size] = {
            name: {
                "cpu_seconds": over_rounds(taken),
                "more_percent": over_rounds([100 * (a / b - 1) for a, b in zip(taken, bare, strict=True)]),
            }
            for name, taken in seconds.items()
        }
    lines = [
        [size, name, as_text(figure["cpu_seconds"]), as_text(figure["more_percent"], "%")]
        for size, arms in figures.items()
        for name, figure in arms.items()
    ]
    print_table(["base", "latents", "CPU-seconds", "more than without"], lines)
    setup = {"rows": source, "batch_size": options.batch_size, "new_tokens": options.new_tokens,
             "trm_dim": options.trm_dim or "hidden / 4", "threads": 1}  # fmt: skip
    record("thinking_cost", {**setup, "sizes": figures}, seed=0, keep=options.record)


if __name__ == "__main__":
    main()

"""Problems per second: `evaluate_gsm8k` against plain `generate()` in the dataset's order, and one at a time.

    python benchmarks/evaluation_speed.py [--base FOLDER] [--batch_size 32] [--repeats 3]

The base is the demo's (it ends its texts itself), with fresh latents; the problems are held-out word problems. Plain
means the same model and the same `generate()`, batch after batch, without grouping, grading or writing to disk. All
three ways write the same texts, up to ties that another padding breaks otherwise: how many agree is told.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from _models import DEMO_BASE, Rows, as_text, held_out_problems, over_rounds, trained_base
from _record import benchmark_options, print_table, record

from smollm_trm.evaluation.evaluate import SPARE_TOKENS, evaluate_gsm8k, longest_completion
from smollm_trm.models.smollm import SmolLMv3WithTRM


def evaluated(model: SmolLMv3WithTRM, rows: Rows, batch_size: int) -> tuple[float, list[str]]:
    """Problems per CPU-second of `evaluate_gsm8k`, and its texts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        started = time.process_time()
        evaluate_gsm8k(model, rows, batch_size=batch_size, predictions_path=path, progress=False)
        seconds = time.process_time() - started
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_index = {line["index"]: line["texts"][0] for line in lines if "index" in line}
    return len(rows) / seconds, [by_index[index] for index in range(len(rows))]


def generated_in_order(model: SmolLMv3WithTRM, rows: Rows, batch_size: int, *, room: int) -> tuple[float, list[str]]:
    """Problems per CPU-second of plain `generate()`, and its texts."""
    texts: list[str] = []
    started = time.process_time()
    for start in range(0, len(rows), batch_size):
        questions = [row["question"] for row in rows[start : start + batch_size]]
        texts += model.generate_with_thinking(questions, max_new_tokens=room)
    return len(rows) / (time.process_time() - started), texts


def main() -> None:
    """Answer the same problems in three ways, in turn."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--base", type=Path, default=DEMO_BASE, help="Hugging Face folder; by default `make demo`'s")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_latents", type=int, default=16)
    parser.add_argument("--n_problems", type=int, default=256)
    parser.add_argument("--n_single", type=int, default=32, help="of them, problems answered one at a time")
    parser.add_argument("--repeats", type=int, default=3, help="rounds in which every way takes a turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = {"base_training": "frozen", "num_latents": options.num_latents}
    model = SmolLMv3WithTRM.from_base(trained_base(options.base), **config).eval()
    rows = held_out_problems(options.n_problems)
    room = longest_completion(model, rows) + SPARE_TOKENS
    ways = {
        "evaluate_gsm8k": lambda: evaluated(model, rows, options.batch_size),
        "generate(), dataset's order": lambda: generated_in_order(model, rows, options.batch_size, room=room),
        "generate(), one at a time": lambda: generated_in_order(model, rows[: options.n_single], 1, room=room),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, list[str]] = {}
    for _ in range(options.repeats):
        for name, answer in ways.items():
            speed, texts[name] = answer()
            speeds[name].append(speed)
    ours, reference = speeds["evaluate_gsm8k"], texts["evaluate_gsm8k"]
    figures = {
        name: {
            "problems_per_cpu_second": over_rounds(own),
            "evaluate_gsm8k_is_faster_by": over_rounds([a / b for a, b in zip(ours, own, strict=True)]),
            "same_texts": f"{sum(a == b for a, b in zip(texts[name], reference, strict=False))}/{len(texts[name])}",
        }
        for name, own in speeds.items()
    }
    print_table(
        ["way", "problems / CPU-s", "evaluate_gsm8k / this", "same texts"],
        [[name, as_text(speed), as_text(ratio), same] for name, (speed, ratio, same) in
         ((name, figure.values()) for name, figure in figures.items())],
    )  # fmt: skip
    setup = {"n_problems": len(rows), "batch_size": options.batch_size, "num_latents": options.num_latents,
             "max_new_tokens": room, "threads": 1}  # fmt: skip
    record("evaluation_speed", {**setup, "ways": figures}, seed=0, keep=options.record)


if __name__ == "__main__":
    main()

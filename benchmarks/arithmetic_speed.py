"""Examples generated and problems evaluated per second.

    python benchmarks/arithmetic_speed.py                              # random weights of every size
    python benchmarks/arithmetic_speed.py --checkpoint checkpoints     # a trained model

Random weights never write `<end>`, so every problem is decoded to the longest chain: the worst case.
"""

import time
from pathlib import Path

import torch
from _record import benchmark_options, record

from smollm_trm.arithmetic.data_set import SumFile, make_parts
from smollm_trm.arithmetic.evaluation import evaluate_sums
from smollm_trm.arithmetic.model import build_arithmetic_model, load_arithmetic_model
from smollm_trm.arithmetic.settings import SumSettings
from smollm_trm.models.loading import default_device


def time_generation(num_examples: int) -> dict[str, float]:
    """Examples per second: drawing and writing down, without files and start-up."""
    speeds = {}
    for max_digits in (2, 3):
        make_parts(SumSettings(num_examples=1000, max_digits=max_digits))
        started = time.perf_counter(), time.process_time()
        make_parts(SumSettings(num_examples=num_examples, max_digits=max_digits))
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        speeds[f"{max_digits}_digits"] = round(num_examples / wall)
        speeds[f"{max_digits}_digits_per_cpu_second"] = round(num_examples / cpu)
    return speeds


def main() -> None:
    """Time both and tell."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-problems", type=int, default=2000)
    parser.add_argument("--sizes", nargs="*", default=["tiny", "small", "medium", "large"])
    options = parser.parse_args()
    generation = time_generation(100_000)
    print(f"generation: {generation['2_digits']:,} examples/s (2 digits), {generation['3_digits']:,} (3 digits)")
    figures = {"threads": torch.get_num_threads(), "generated_per_second": generation, "evaluation": {}}
    settings = SumSettings(num_examples=options.num_problems)
    lines = [line for part in make_parts(settings).values() for line in part]
    device = default_device()
    if options.checkpoint:
        models = {"trained": load_arithmetic_model(Path(options.checkpoint))}
    else:
        models = {size: build_arithmetic_model(size) for size in options.sizes}
    for name, model in models.items():
        few = (
            options.num_problems if name in ("tiny", "trained") or device.type == "cuda" else options.num_problems // 4
        )
        data = SumFile(path=Path("none"), examples=lines[:few])
        started = time.perf_counter(), time.process_time()
        report = evaluate_sums(model.to(device), data, batch_size=options.batch_size)
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        figures["evaluation"][name] = {
            "device": device.type, "batch_size": options.batch_size, "num_problems": few,
            "decoded_per_second": report["problems_per_second"], "evaluated_per_second": round(few / wall, 1),
            "evaluated_per_cpu_second": round(few / cpu, 1), "exact_match": report["exact_match"],
        }  # fmt: skip
        print(f"evaluation, {name}: {few / wall:,.0f} problems/s ({few / cpu:,.0f} per CPU-second)")
    record("arithmetic_speed", figures, keep=options.record)


if __name__ == "__main__":
    main()

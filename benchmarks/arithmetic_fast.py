"""How good `train --preset fast` is, and when: exact match after 1, 2, 3 ... minutes on this machine.

    python benchmarks/arithmetic_fast.py --max-digits 2     # the bar: 99% within 3 minutes on two cores
    python benchmarks/arithmetic_fast.py --max-digits 3     # the bar: 99% within 6 minutes

The curve is the run's own validation (exact completion, teacher-forced: what greedy decoding would write exactly);
the last figure is the decoded test part. Minutes count from the start of training, the wall time of the whole command
(reading, training, test) is given too. On a machine shared with other work only the CPU seconds mean something.
"""

import csv
import tempfile
import time
from pathlib import Path

import torch
from _record import benchmark_options, record

from smollm_trm.arithmetic.commands import generate_arithmetic
from smollm_trm.arithmetic.settings import SUM_OPTIMIZERS, SumSettings, SumTrainingSettings
from smollm_trm.arithmetic.training import train_sums


def main() -> None:
    """Generate, train, test, tell."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--max-digits", type=int, default=2)
    parser.add_argument("--max-operands", type=int, default=3)
    parser.add_argument("--max-steps", type=int, help="other than the preset's, as the options that follow")
    parser.add_argument("--optimizer", choices=SUM_OPTIMIZERS)
    parser.add_argument("--problem-weight", type=float)
    parser.add_argument("--one-column-repeats", type=int)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"max_digits": options.max_digits, "max_operands": options.max_operands}
        print(generate_arithmetic(SumSettings(**sizes, output_dir=folder)))
        names = ("max_steps", "optimizer", "problem_weight", "one_column_repeats")
        changed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        given = {"data_dir": folder, "output_dir": f"{folder}/run", "seed": options.seed, "no_wandb": True, **changed}
        settings = SumTrainingSettings(preset="fast", **given)
        wall, cpu = time.perf_counter(), time.process_time()
        results = train_sums(settings)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        with Path(folder, "run/logs/metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["val_exact_match"]]
    curve = [(int(row["step"]) + 1, float(row["seconds"]), float(row["val_exact_match"])) for row in rows]
    print("\n  step   seconds   exact match (validation)")
    for step, seconds, exact in curve:
        print(f"{step:>6} {seconds:>9.0f} {exact:>10.2%}")
    by_minute = {}
    for minute in range(1, int(curve[-1][1] // 60) + 2):
        seen = [exact for _, seconds, exact in curve if seconds <= 60 * minute]
        by_minute[str(minute)] = round(seen[-1], 4) if seen else None
    print(f"by minute: {by_minute}")
    print(f"test: {results['exact_match']:.2%} of {results['num_examples']}, {wall:.0f} s wall, {cpu:.0f} CPU-s")
    record(
        f"arithmetic_fast_{options.max_digits}_digits",
        {
            "test_exact_match": results["exact_match"],
            "test_chain_accuracy": results["chain_accuracy"],
            "num_test": results["num_examples"],
            "exact_match_by_digits": {key: row["exact_match"] for key, row in results["by_digits"].items()},
            "exact_match_by_minute": by_minute,
            "wall_seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
            "threads": torch.get_num_threads(),
            "changed": changed,
            "curve": curve,
        },
        seed=options.seed,
        keep=options.record,
    )


if __name__ == "__main__":
    main()

"""The three phases on a twin that thinks in text, ending in one table: `make phases`, at most 12 minutes on two cores.

    python benchmarks/phases.py [--pairs 12000] [--problems 1000] [--seed 0] [--record]

A twin learns to think inside `<think>` ... `</think>` before it answers. Then: 1a, a compressor of its states on text;
thinking states of training problems; 1b, the compressor on those thoughts; the recursion from the states before to the
state after; LoRA that reads true states; and the table of all arms on the same held-out problems. "does not think" is
LoRA trained in as many steps, on the same rows, to answer at once. A model in OUTPUT/grpo joins the table as "GRPO".
Run again, it goes on where it stopped.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from _models import write_demo_problems
from _record import benchmark_options, print_table, record

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.rows import read_jsonl
from smollm_trm.demo import DemoSize, demo_settings, length_of, processes
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.storage import local_model_folder
from smollm_trm.phases.assemble import assemble
from smollm_trm.phases.compressor import pretrain_compressor
from smollm_trm.phases.datagen import generate_pairs
from smollm_trm.phases.settings import (
    AssembleSettings,
    CompareStatesSettings,
    CompressorRunSettings,
    DatagenSettings,
    SequenceSettings,
)
from smollm_trm.phases.states import compare_states
from smollm_trm.phases.trm import part_of_problem, train_sequence_trm
from smollm_trm.records import write_json

WIDTH, SWEEP = 96, [32, 64]
READING = {"max_steps": 400, "learning_rate": 2e-3}


def thinking_twin(folder: Path, size: DemoSize, *, seed: int) -> dict[str, Any]:
    """Settings of the twin that thinks in text, trained whole."""
    return {
        **demo_settings(folder / "data", size, seed=seed),
        **length_of(size.base_steps, size.batch_size),
        "model_name": "tiny",
        "base_training": "full",
        "use_trm": False,
        "target": "think",
        "learning_rate": 4e-3,
        "output_dir": str(folder / "base"),
    }


def train_control(folder: Path, size: DemoSize, n_pairs: int, seed: int) -> float:
    """LoRA that answers at once, on the rows whose states the other one reads; its CPU seconds."""
    started = time.process_time()
    rows = [row for row in first_rows(folder, n_pairs) if part_of_problem(row["question"]) == "train"]
    dev = [row for row in first_rows(folder, n_pairs) if part_of_problem(row["question"]) == "dev"]
    train_gsm8k(
        **{**demo_settings(folder / "data", size, seed=seed), "data_dir": None}, train_dataset=rows, test_dataset=dev,
        model_name=str(folder / "base" / "model"), use_trm=False, target="answer", progress=False, **READING,
        output_dir=str(folder / "no_thinking"), save_every_n_steps=200,
    )  # fmt: skip
    return time.process_time() - started


def first_rows(folder: Path, count: int) -> list[dict[str, str]]:
    """The training problems that the twin thinks about."""
    return [row for _, row in read_jsonl(folder / "data" / "train.jsonl")][:count]


def main() -> None:
    """Run the phases and print the table."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--pairs", type=int, default=12_000, help="training problems that are thought about")
    parser.add_argument("--problems", type=int, default=1000, help="held-out problems that every arm answers")
    parser.add_argument("--base_steps", type=int, default=DemoSize().base_steps)
    parser.add_argument("--epochs", type=int, default=3, help="passes of the recursion over the pairs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/phases"))
    options = parser.parse_args()
    size, seed, folder = DemoSize(base_steps=options.base_steps), options.seed, options.output_dir / f"{options.seed}"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started, noted = time.perf_counter(), folder / "cpu_seconds.json"
    seconds = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}

    def stage(name: str, begun: float) -> None:
        seconds[name] = round(seconds.get(name, 0) + time.process_time() - begun, 1)  # of all sessions
        write_json(noted, seconds)
        print(f"== {name}: {seconds[name]:.0f} CPU seconds", flush=True)

    begun = time.process_time()
    write_demo_problems(folder, size, seed=seed)
    train_gsm8k(**thinking_twin(folder, size, seed=seed))
    stage("twin that thinks in text", begun)
    base, pairs = str(folder / "base"), str(folder / "pairs")
    with processes(1) as other_core:
        control = other_core.submit(train_control, folder, size, options.pairs, seed)
        begun = time.process_time()
        common = {"model_name": base, "d_compressed": WIDTH, "batch_size": 64, "num_epochs": 2, "seed": seed}
        stage_1a = pretrain_compressor(CompressorRunSettings(
            **common, data="gsm8k", data_dir=str(folder / "data"), sweep=SWEEP, num_samples=2000,
            output_dir=str(folder / "compressor_1a"),
        ))  # fmt: skip
        stage("compressor 1a", begun)
        begun = time.process_time()
        index = generate_pairs(DatagenSettings(
            model_name=base, data_dir=str(folder / "data"), num_samples=options.pairs, batch_size=128,
            max_new_tokens=96, checkpoint_every=1024, output_dir=pairs,
        ))  # fmt: skip
        stage("datagen", begun)
        begun = time.process_time()
        stage_1b = pretrain_compressor(CompressorRunSettings(
            **common, stage="1b", data=pairs, num_samples=2000, output_dir=str(folder / "compressor_1b"),
            compressor_checkpoint=str(folder / "compressor_1a"),
        ))  # fmt: skip
        stage("compressor 1b", begun)
        begun = time.process_time()
        trm = train_sequence_trm(SequenceSettings(
            data=pairs, compressor_checkpoint=str(folder / "compressor_1b"), batch_size=64, num_epochs=options.epochs,
            learning_rate=2e-3, n_heads=4, n_latent_steps=1, n_deep_recursions=1, n_supervision_steps=2,
            bce_halt_loss=True, seed=seed, output_dir=str(folder / "trm"),
        ))  # fmt: skip
        stage("sequence TRM", begun)
        begun = time.process_time()
        reading = assemble(AssembleSettings(
            model_name=base, data_path=pairs, compressor_checkpoint=str(folder / "compressor_1b"), **READING,
            trm_checkpoint=str(folder / "trm"), seed=seed, output_dir=str(folder / "assembled"),
        ))  # fmt: skip
        stage("assemble", begun)
        control = "does not think (the other core)", control.result()
        seconds[control[0]] = round(seconds.get(control[0], 0) + control[1], 1)
    begun = time.process_time()
    more = {"does not think": str(folder / "no_thinking")}
    if local_model_folder(folder / "grpo") is not None:
        more["GRPO"] = str(folder / "grpo")
    comparison, states = compare_states(CompareStatesSettings(
        model=str(folder / "assembled"), thinking=base, models=more, data_dir=str(folder / "data"), batch_size=128,
        max_samples=options.problems, max_new_tokens=96, output_dir=str(folder / "states"), seed=seed,
    ))  # fmt: skip
    stage("all arms", begun)
    minutes = (time.perf_counter() - started) / 60
    print_table(["stage", "CPU seconds"], [[name, one] for name, one in seconds.items()])
    for name, one in trm["held_out"].items():
        print(f"{name}: { {key: round(value, 4) for key, value in one.items()} }")
    print(f"\n{comparison}\n{minutes:.1f} minutes; everything is in {folder}")
    kept = ("base", "mean vector", f"kept {WIDTH}", f"start {WIDTH}", f"PCA {WIDTH}")
    compressors = {name: {key: one["held_out"][key] for key in kept if key in one["held_out"]}
                   for name, one in (("1a", stage_1a), ("1b", stage_1b))}  # fmt: skip
    arms = {arm.name: [arm.correct, arm.total] for arm in comparison.arms}
    figures = {"minutes": round(minutes, 1), "cpu_seconds": seconds, "arms": arms, "trm": trm["held_out"],
               "pairs": [index["n_pairs"], index["n_problems"], index["not_closed"]], "compressors": compressors,
               "reading_dev_loss": reading["dev_loss"], "not_closed": states["not_closed"],
               "held_out_problems": len(load_gsm8k(folder / "data", seed=seed).gsm8k_final_test)}  # fmt: skip
    record("phases", figures, seed=seed, keep=options.record)


if __name__ == "__main__":
    main()

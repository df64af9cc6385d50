"""How small models add: with and without a chain, with reversed digits, beyond the trained length, with latents.

    python benchmarks/arithmetic_study.py                          # every arm; finished arms are not run again
    python benchmarks/arithmetic_study.py --arms direct_2 trm_2    # some

Every arm trains the same 2-layer decoder (0.4M parameters) from the same start on the same problems, with the same
number of floating point operations (forward and backward, reasoner and read pass included, counted by torch on the
arm's own batches): a chain costs four times the tokens of a direct answer, so a direct arm makes more steps. A problem
counts as right when the whole completion is the model's first choice token by token, which is what greedy decoding
would write exactly. The arms with latents write the answer at once after `<think>`, M latents, `</think>`.
"""

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _record import benchmark_options, record
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

from smollm_trm.arithmetic.data_set import draw_data_set
from smollm_trm.arithmetic.model import build_arithmetic_model, build_arithmetic_tokenizer
from smollm_trm.arithmetic.module import ADAM_BETAS, build_sum_optimizer, warm_up_then_cosine
from smollm_trm.arithmetic.rules import write_sum
from smollm_trm.arithmetic.settings import SumSettings, SumTrainingSettings
from smollm_trm.data.batching import LengthGroupedBatches, collate_examples
from smollm_trm.data.prompts import EncodedExample, PromptEncoder
from smollm_trm.evaluation.statistics import paired_difference, wilson_interval
from smollm_trm.models.reasoners.reasoner import latent_variation
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import write_json
from smollm_trm.training.module import predicted_and_labels, rows_all_right

BATCH_SIZE = 64
NUM_LATENTS = 4
TRM = {"n_read_layers": 2, "n_latent_steps": 3, "n_deep_recursions": 1, "n_supervision_steps": 2}
WARMUP_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of adding."""

    max_digits: int
    """Digits of the longest operand trained on."""
    chain: bool = False
    """Write the columns first."""
    digit_order: str = "normal"
    """Of the answer."""
    reasoner: str | None = None
    """What fills the latent span; None for no span."""
    reasoner_learning_rate: float = 2e-3
    """Learning rate of the reasoner (the decoder's is 3e-3)."""


ARMS = {
    **{f"direct_{digits}": Arm(max_digits=digits) for digits in (2, 3)},
    **{f"reversed_{digits}": Arm(max_digits=digits, digit_order="reversed") for digits in (2, 3)},
    **{f"chain_{digits}": Arm(max_digits=digits, chain=True) for digits in (2, 3)},
    **{f"{kind}_2": Arm(max_digits=2, reasoner=kind) for kind in ("static", "compressor", "trm")},
}


def encode_arm(arm: Arm, problems: list[list[int]], encoder: PromptEncoder) -> list[EncodedExample]:
    """Problems as prompt and completion ids."""
    lines = [write_sum(operands, chain=arm.chain, digit_order=arm.digit_order) for operands in problems]
    prompts = [line[: line.index("=") + 1] for line in lines]
    completions = [line[len(prompt) :] for line, prompt in zip(lines, prompts, strict=True)]
    tokenizer = encoder.tokenizer
    asked = [encoder.encode_prompt(prompt) for prompt in prompts] if arm.reasoner else tokenizer(prompts)["input_ids"]
    pairs = zip(asked, tokenizer(completions)["input_ids"], strict=True)
    return [EncodedExample(prompt, completion) for prompt, completion in pairs]


def build(arm: Arm, seed: int, questions: list[str]) -> SmolLMv3WithTRM:
    """The small decoder, trained whole, with the arm's reasoner, whose statistics are measured on some questions."""
    config = {
        "base_training": "full", "target": "answer", "prompt_format": "bare", "num_latents": NUM_LATENTS,
        "reasoner": arm.reasoner, "reasoner_settings": TRM if arm.reasoner == "trm" else {}, "calibration": questions,
    }  # fmt: skip
    base = build_arithmetic_model("tiny", seed=seed)
    return SmolLMv3WithTRM.from_base((base, build_arithmetic_tokenizer()), seed=seed, **config)


def step_flops(model: SmolLMv3WithTRM, batch: dict[str, torch.Tensor]) -> float:
    """Floating point operations of a training step on this batch, the mean over supervision steps."""
    counts = []
    for n_steps in supervision_steps(model):
        with FlopCounterMode(display=False) as counter:
            model(**batch, n_steps=n_steps).loss.backward()
        counts.append(counter.get_total_flops())
    model.zero_grad()
    return sum(counts) / len(counts)


def supervision_steps(model: SmolLMv3WithTRM) -> list[int | None]:
    """The supervision steps one of which a batch draws."""
    steps = 1 if model.reasoner is None else model.reasoner.n_supervision_steps
    return [None] if steps == 1 else list(range(1, steps + 1))


def build_optimizers(model: SmolLMv3WithTRM, arm: Arm) -> list[torch.optim.Optimizer]:
    """The fast preset's for the decoder, AdamW for the reasoner."""
    decoder = build_sum_optimizer(model.model.language_model, SumTrainingSettings(preset="fast"))
    if model.reasoner is None:
        return [decoder]
    parts = model.reasoner.parameter_groups(arm.reasoner_learning_rate)
    groups = [{"params": parameters, "lr": learning_rate} for _, parameters, learning_rate in parts]
    return [decoder, torch.optim.AdamW(groups, betas=ADAM_BETAS)]


def train(model: SmolLMv3WithTRM, arm: Arm, examples: list[EncodedExample], tera_flops: float, seed: int) -> dict:
    """Train for the given compute; returns what it took."""
    batches = LengthGroupedBatches(lengths=[len(e) for e in examples], batch_size=BATCH_SIZE, seed=seed)
    padding = model.tokenizer.pad_token_id
    sample = [collate_examples([examples[i] for i in rows], padding) for rows in list(batches)[:8]]
    num_steps = round(tera_flops * 1e12 / (sum(step_flops(model, batch) for batch in sample) / len(sample)))
    optimizers = build_optimizers(model, arm)
    schedules = [
        LambdaLR(optimizer, partial(warm_up_then_cosine, warmup_steps=WARMUP_STEPS, num_steps=num_steps))
        for optimizer in optimizers
    ]
    draw, choices = torch.Generator().manual_seed(seed), supervision_steps(model)
    started, step, variations = time.process_time(), 0, {}
    while step < num_steps:
        for rows in list(batches)[: num_steps - step]:
            batch = collate_examples([examples[i] for i in rows], padding)
            n_steps = choices[int(torch.randint(len(choices), (), generator=draw))]
            output = model(**batch, n_steps=n_steps)
            model.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepped in (*optimizers, *schedules):
                stepped.step()
            step += 1
            if step % 250 == 0 or step == num_steps:
                if output.latents is not None:
                    variations[step] = round(float(latent_variation(output.latents)), 4)
                seconds, variation = time.process_time() - started, variations.get(step, "")
                print(f"  step {step}/{num_steps} loss {output.loss.item():.4f} {seconds:.0f} CPU-s {variation}")
        batches.set_epoch(batches.epoch + 1)
    seconds = round(time.process_time() - started)
    return {"num_steps": num_steps, "cpu_seconds": seconds, "latent_variation": variations}


@torch.inference_mode()
def grade(model: SmolLMv3WithTRM, examples: list[EncodedExample], *, shuffled: bool = False) -> list[bool]:
    """Which problems are answered right; `shuffled` gives every problem the latents of its neighbour."""
    model.eval()
    right: list[bool] = []
    for start in range(0, len(examples), 256):
        batch = collate_examples(examples[start : start + 256], model.tokenizer.pad_token_id)
        latents = None
        if shuffled:
            latents = model.think(batch["input_ids"], batch["attention_mask"])[-1].latents.roll(1, dims=0)
        output = model(**batch, latents=latents)
        right += rows_all_right(*predicted_and_labels(output.logits, batch["labels"])).tolist()
    return right


def run_arm(name: str, options: argparse.Namespace) -> dict:
    """Train and grade one arm."""
    arm, seed = ARMS[name], options.seed
    problems = draw_data_set(SumSettings(max_digits=arm.max_digits, seed=1))
    longer = [p for p in draw_data_set(SumSettings(num_examples=20_000, max_digits=arm.max_digits + 1, seed=2))
        if len(str(max(p))) > arm.max_digits][: options.num_test]  # fmt: skip
    questions = ["+".join(map(str, operands)) + "=" for operands in problems[options.num_test :][:64]]
    model = build(arm, seed, questions)
    encoded = encode_arm(arm, problems, model.encoder)
    took = train(model, arm, encoded[options.num_test :], options.tera_flops, seed)
    right = grade(model, encoded[: options.num_test])
    result = {
        "arm": name, "seed": seed, "tera_flops": options.tera_flops, **took,
        "exact_match": sum(right) / len(right), "exact_match_95": list(wilson_interval(sum(right), len(right))),
        "one_digit_longer": sum(grade(model, encode_arm(arm, longer, model.encoder))) / len(longer),
        "right": [int(value) for value in right],
    }  # fmt: skip
    if arm.reasoner:
        without = grade(model, encoded[: options.num_test], shuffled=True)
        result["latents_shuffled"] = sum(without) / len(without)
    return result


def table(results: dict[str, dict]) -> str:
    """The study as a table, each arm against direct answers on the same problems."""
    lines = ["arm           steps  CPU-s  exact match (95%)         one digit longer  shuffled  against direct"]
    for name, result in results.items():
        low, high = result["exact_match_95"]
        baseline = results.get(f"direct_{name[-1]}")
        against = ""
        if baseline and not name.startswith("direct"):
            paired = paired_difference(result["right"], baseline["right"])
            interval = f"({100 * paired.low:+.1f} to {100 * paired.high:+.1f})"
            against = f"{100 * paired.difference:+.1f} {interval}, p={paired.p_value:.2g}"
        shuffled = f"{result['latents_shuffled']:.1%}" if "latents_shuffled" in result else ""
        lines.append(
            f"{name:<12} {result['num_steps']:>6} {result['cpu_seconds']:>6}  {result['exact_match']:>6.1%} "
            f"({low:.1%} to {high:.1%})  {result['one_digit_longer']:>14.1%}  {shuffled:>9}  {against}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tera-flops", type=float, default=8.0, help="training compute of each arm, 10^12 operations")
    parser.add_argument("--num-test", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="outputs/arithmetic_study", help="finished arms, one JSON each")
    options = parser.parse_args()
    results = {}
    for name in options.arms:
        path = Path(options.folder) / f"{name}_seed{options.seed}_{options.tera_flops:g}.json"
        if not path.is_file():
            print(name, flush=True)
            write_json(path, run_arm(name, options))
        results[name] = json.loads(path.read_text())
    print(table(results))
    kept = {name: {key: value for key, value in result.items() if key != "right"} for name, result in results.items()}
    record("arithmetic_study", {"arms": kept}, seed=options.seed, keep=options.record)


if __name__ == "__main__":
    main()

"""The commands of `smollm-trm` but for those of the subpackages: typed functions and settings, documented for --help.

Each imports what it needs when it runs, so that help and mistakes are quick.
"""

import logging
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from smollm_trm.records import UserMistake, picked, run_record, without_local_paths, write_json

if TYPE_CHECKING:
    from smollm_trm.training.grpo_settings import GRPOSettings
    from smollm_trm.training.settings import TrainSettings

CHOICES = {
    **{"part": ("dev", "test"), "target": ("steps", "answer"), "prompt_format": ("plain", "chat")},
    **{"precision": ("auto", "fp32", "bf16", "fp16"), "latents": ("own", "shuffled")},
}
LEAST = {"max_samples": 1, "batch_size": 1, "shots": 0, "seed": 0, "max_new_tokens": 1, "samples_per_problem": 1}
OF_BASE = ("target", "prompt_format", "precision", "trust_remote_code", "load_in_4bit")
OF_DATA = ("part", "data_dir", "dataset_path", "seed", "question_column", "answer_column")
IN_NAMES = {
    **{"target": "{}", "prompt_format": "{}", "shots": "{}-shot", "max_samples": "first-{}", "latents": "{}"},
    **{"max_new_tokens": "{}-tokens", "samples_per_problem": "{}-votes", "precision": "{}", "seed": "seed-{}"},
    "load_in_4bit": "4-bit",
}


@dataclass(frozen=True, kw_only=True)
class AskedModel:
    """How a model is loaded, and an untuned base asked."""

    target: str | None = None
    """What an untuned base is to write, "steps" (the default) or "answer"."""
    prompt_format: str | None = None
    """How an untuned base is asked, "plain" (the default) or "chat"."""
    precision: str = "auto"
    """Of the base's weights: "auto" (by the device), "fp32", "bf16" or "fp16"."""
    load_in_4bit: bool = False
    """Keep a base's linear layers in 4 bits (bitsandbytes)."""
    trust_remote_code: bool = False
    """Run code that an untuned base brings with it; without this word none is run."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value not in CHOICES.get(name, (value,)):
                raise UserMistake(f"{name}={value!r}: choose {' or '.join(map(repr, CHOICES[name]))}")
            if value is not None and name in LEAST and value < LEAST[name]:
                raise UserMistake(f"{name}={value}: must be at least {LEAST[name]}")
            if name == "output_dir" and value == "":
                raise UserMistake("output_dir: it is empty; name a folder")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(AskedModel):
    """What `evaluate`, `compare` and `lm-eval` have in common."""

    part: str = "dev"
    """"dev" (the 20% part) or "test" (the official test set, for the final evaluation)."""
    data_dir: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; without it GSM8K_DIR, then the Hub."""
    dataset_path: str | None = None
    """Own data instead of GSM8K."""
    question_column: str = "question"
    """Its column or key with the questions; answer_column likewise."""
    answer_column: str = "answer"
    """Its column or key with the answers: solutions that end in `#### answer`, or answers alone, numbers or words."""
    max_samples: int | None = None
    """Only the first so many problems; None for all."""
    batch_size: int = 32
    """Problems generated at once."""
    shots: int = 0
    """Worked examples, from GSM8K's training part, that an untuned base is shown first; the field reports 8."""
    overwrite: bool = False
    """Make predictions anew that were made before, with other settings or by a model that was trained again."""
    seed: int = 42
    """Of the split, the sampling and the shuffle."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots and self.dataset_path is not None:
            raise UserMistake("shots: worked examples come from GSM8K's training part; leave dataset_path or shots out")

    @property
    def problems(self) -> str:
        return Path(self.dataset_path).stem if self.dataset_path else self.part

    @property
    def file_name(self) -> str:
        """Of results and predictions: the problems, and every setting that is not the default."""
        fields = type(self).__dataclass_fields__
        changed = {name: getattr(self, name) for name in IN_NAMES if name in fields}
        words = [IN_NAMES[name].format(one) for name, one in changed.items() if one != fields[name].default]
        return "-".join([self.problems, *words])


@dataclass(frozen=True)
class EvaluateSettings(EvaluationSettings):
    """Settings of `smollm-trm evaluate`."""

    model: str
    """Folder of a saved model or of a training run, or a base model by name or folder."""
    max_new_tokens: int | None = None
    """Limit of each answer; None makes room for the longest gold solution."""
    latents: str = "own"
    """"own", or "shuffled" (each problem gets another's latents: a control)."""
    samples_per_problem: int = 1
    """Above 1, answers are sampled and the commonest counts."""
    output_dir: str | None = None
    """Results and predictions go here; None puts them beside the model."""


def evaluate(settings: EvaluateSettings) -> str:
    """Answer problems with a saved model or an untuned base, and grade them."""
    from smollm_trm.evaluation.evaluate import evaluate_gsm8k
    from smollm_trm.evaluation.halting import judge_halting
    from smollm_trm.evaluation.loading import load_for_evaluation, problems_of, worked_examples
    from smollm_trm.models.hub import add_evaluation
    from smollm_trm.models.storage import local_model_folder

    rows, split = problems_of(**picked(settings, *OF_DATA), models=[settings.model])
    model = load_for_evaluation(settings.model, **picked(settings, *OF_BASE))
    name = settings.problems
    saved, own = local_model_folder(settings.model), settings.latents == "own"
    beside = Path(settings.model) if saved else Path("outputs") / Path(settings.model).name
    predictions = Path(settings.output_dir or beside / "evaluation") / f"{settings.file_name}.jsonl"
    how = ("max_samples", "batch_size", "max_new_tokens", "latents", "samples_per_problem", "seed", "overwrite")
    examples = worked_examples(settings.shots, settings.data_dir, split)
    options = {**picked(settings, *how), "worked_examples": examples, "predictions_path": predictions}
    result = evaluate_gsm8k(model, rows, **options)
    halting = judge_halting(model, rows, result["correct_by_problem"]) if own else None
    record = {"part": name, "model": without_local_paths(settings.model), "seed": settings.seed, "split": split}
    report_file = predictions.with_suffix(".json")
    write_json(report_file, {**record, **result, "halting": halting, **run_record()})
    if saved:
        add_evaluation(saved, settings.file_name, {**result, "source": split["source"]})
    label = name + (f", {settings.shots} shots" if settings.shots else "") + ("" if own else " with latents shuffled")
    lines = evaluation_lines(label, result, halting, trained_on_losses=model.config.target == "steps")
    return f"{lines}\nresults in {report_file}"


def evaluation_lines(label: str, result: dict, halting: dict | None, *, trained_on_losses: bool) -> str:
    """The scores of `evaluate_gsm8k` and of `judge_halting` in words."""
    low, high = result["interval"]
    scores = (
        f"{label}: {100 * result['accuracy']:.1f}% of {result['total']} problems "
        f"(95% interval {100 * low:.1f} to {100 * high:.1f}), strict {100 * result['strict_accuracy']:.1f}%"
    )
    if result.get("cot_match") is not None:
        scores += f", CoT match {100 * result['cot_match']:.1f}%"
    if halting is None:
        return scores
    judged = "right answers" + (", though trained on losses" if trained_on_losses else "")
    auroc = "not defined (all alike)" if halting["auroc"] is None else f"{halting['auroc']:.2f}"
    return (
        f"{scores}\nhalting head: AUROC {auroc} for {judged} (base rate {halting['base_rate']:.2f}), would stop after "
        f"{halting['mean_steps']:.1f} of {halting['steps']} steps"
    )


@dataclass(frozen=True, kw_only=True)
class CompareSettings(EvaluationSettings):
    """Settings of `smollm-trm compare`."""

    models: dict[str, str]
    """Arm names and their folders, such as '{"base": "HuggingFaceTB/SmolLM3-3B", "TRM": "outputs/run"}'."""
    baseline: str | None = None
    """The arm that differences are taken from; the first when None."""
    output_dir: str = "outputs/comparison"
    """Predictions, table and plot go here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise UserMistake("models: name at least one arm, such as --models.TRM outputs/run")
        if self.baseline not in (None, *self.models):
            raise UserMistake(f"baseline={self.baseline!r}: choose one of the arms, {', '.join(self.models)}")


def compare(settings: CompareSettings) -> str:
    """Evaluate several models on the same problems, shuffled latents included; print a table, draw a plot."""
    from smollm_trm.evaluation.arms import arm_stems, evaluate_arm, report_comparison
    from smollm_trm.evaluation.loading import load_for_evaluation, problems_of, saved_or_downloaded, worked_examples
    from smollm_trm.models.hub import add_evaluation
    from smollm_trm.models.storage import local_model_folder

    models, folder = settings.models, Path(settings.output_dir)
    arm_stems(list(models))
    rows, split = problems_of(**picked(settings, *OF_DATA), models=list(models.values()))
    examples = worked_examples(settings.shots, settings.data_dir, split)
    options = picked(settings, "max_samples", "batch_size", "seed", "overwrite")
    results, model = {}, None
    for name, place in models.items():
        print(name)
        del model  # or two bases stand in memory at once
        of_model = ("precision", "load_in_4bit") if saved_or_downloaded(place) else OF_BASE
        model = load_for_evaluation(place, **picked(settings, *of_model))
        shown_first = {} if model.config.think else {"worked_examples": examples}
        found = evaluate_arm(name, model, rows, folder, **options, **shown_first)
        for arm, result in found.items() if (saved := local_model_folder(place)) else ():
            asked = settings.problems + (f"-first-{settings.max_samples}" if settings.max_samples else "")
            add_evaluation(saved, asked + arm.removeprefix(name), {**result, "source": split["source"]})
        results |= found
    baseline = settings.baseline or next(iter(models))
    shown = {name: without_local_paths(place) for name, place in models.items()}
    record = {"part": settings.part, "seed": settings.seed, "models": shown, "split": split}
    comparison = report_comparison(results, folder, baseline=baseline, **record)
    shots = f", untuned bases with {settings.shots} worked examples" if settings.shots else ""
    return f"{settings.problems}{shots}\n{comparison}\nplot in {folder / 'comparison.png'}"


@dataclass(frozen=True)
class LmEvalSettings(EvaluationSettings):
    """Settings of `smollm-trm lm-eval`."""

    model: str
    """Folder of a saved model or of a training run, or a base model by name or folder."""
    tasks: str = "gsm8k_latent"
    """Tasks of the harness by name, or YAML files of tasks, with commas between; "gsm8k_latent" is ours, of these
    problems. A model with latents is asked the others by its chat template, which writes the span."""
    output_dir: str = "outputs/lm-eval"
    """Problems and results go here."""


def lm_eval(settings: LmEvalSettings) -> str:
    """Let EleutherAI's harness ask and grade a saved model or an untuned base."""
    from smollm_trm.data.rows import write_jsonl
    from smollm_trm.evaluation.lm_eval import LM_EVAL_TASK, evaluate_tasks, evaluate_with_lm_eval
    from smollm_trm.evaluation.loading import load_for_evaluation, problems_of, worked_examples

    file = Path(settings.output_dir) / f"{settings.file_name}.jsonl"
    tasks, found = [task.strip() for task in settings.tasks.split(",") if task.strip()], []
    model = load_for_evaluation(settings.model, **picked(settings, *OF_BASE))
    if LM_EVAL_TASK in tasks:
        rows, split = problems_of(**picked(settings, *OF_DATA), models=[settings.model])
        write_jsonl(file, rows[: settings.max_samples])
        shown = {"worked_examples": worked_examples(settings.shots, settings.data_dir, split)}
        found.append(evaluate_with_lm_eval(model, file, batch_size=settings.batch_size, **shown))
        tasks.remove(LM_EVAL_TASK)
    if tasks:
        chat = model.config.think or settings.prompt_format == "chat"
        how = {"num_fewshot": settings.shots, "limit": settings.max_samples, "apply_chat_template": chat}
        found.append(evaluate_tasks(model, tasks, batch_size=settings.batch_size, **how))
    from lm_eval.utils import make_table

    report = file.with_suffix(".json")
    write_json(report, {"results": [one["results"] for one in found], **run_record()})
    label = ", chat format" if settings.prompt_format == "chat" else ""
    return f"{settings.problems}, {settings.shots}-shot{label}\n{''.join(map(make_table, found))}results in {report}"


@dataclass(frozen=True)
class AskSettings(AskedModel):
    """Settings of `smollm-trm ask`."""

    model: str
    """Folder of a saved model or of a training run, or a base model by name or folder."""
    question: str | None = None
    """A bare question."""
    max_new_tokens: int = 256
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 is greedy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.temperature < 100:
            raise UserMistake(f"temperature={self.temperature}: must be from 0 to 100")
        if self.question is not None:
            check_question(self.question)


def ask(settings: AskSettings) -> str:
    """Answer one question, or, without one, converse, word by word (what was said before counts in chat format)."""
    from transformers import TextStreamer

    from smollm_trm.evaluation.loading import load_for_evaluation

    loaded = load_for_evaluation(settings.model, **picked(settings, *OF_BASE))
    options = picked(settings, "max_new_tokens")
    if settings.temperature > 0:
        options |= {"do_sample": True, "temperature": settings.temperature}
    if settings.question is not None:
        return loaded.generate_with_thinking(settings.question, **options).strip()
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    said: list[dict[str, str]] = []
    sys.stderr.write("type a question; an empty line ends\n" if (typed := sys.stdin.isatty()) else "")
    with suppress(EOFError):
        while (line := input("> " if typed else "").strip()) or not typed:
            if line:
                check_question(line)
                said = [*(said if loaded.config.prompt_format == "chat" else ()), {"role": "user", "content": line}]
                [answer] = loaded.generate_with_thinking([said], streamer=streamer, **options)
                said.append({"role": "assistant", "content": answer.strip()})
    return ""


def check_question(question: str) -> None:
    """Refuse what is no question: nothing, or bytes that are no text."""
    if not question.strip():
        raise UserMistake("question: it is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        raise UserMistake("question: it holds bytes that are not UTF-8 text")


def push(model: str, repo_id: str, private: bool = True, dry_run: bool = False) -> str:
    """Upload a saved model, or a part of the phases, to the Hub, with a card that states what was measured.

    Args:
        model: folder of a saved model, of a compressor, of a sequence TRM, or of a training run.
        repo_id: "owner/name".
        private: whether a new repository is private.
        dry_run: write the card and list the files, upload nothing.
    """
    from smollm_trm.models.hub import check_repo_id, push_model, upload
    from smollm_trm.models.storage import saved_model_folder
    from smollm_trm.phases.parts import part_folder

    options = {"private": private, "dry_run": dry_run}
    if (part := part_folder(model)) is not None:
        check_repo_id(repo_id)
        files = upload(part, repo_id, **options)
    else:
        files = push_model(saved_model_folder(model), repo_id, **options)
    return f"{'would push' if dry_run else 'pushed'} to {repo_id}: {', '.join(files)}"


def train(settings: "TrainSettings") -> str:
    """Train LoRA and a reasoner, on GSM8K unless told otherwise."""
    from smollm_trm.finetune import train_gsm8k

    logging.getLogger("smollm_trm").setLevel(logging.INFO)  # what is trained, from which step, in which stage
    trainer, _ = train_gsm8k(**vars(settings))
    folder = settings.output_dir
    return f"the model is in {folder}/model, results in {folder}/results.json" if trainer.is_global_zero else ""


def grpo(settings: "GRPOSettings") -> str:
    """Train a saved model on the grades of its own sampled answers."""
    if find_spec("trl") is None:
        raise UserMistake("grpo needs TRL, which is not installed: pip install 'smollm-trm[grpo]'")
    from smollm_trm.grpo import train_grpo

    if settings.progress:
        logging.getLogger("smollm_trm").setLevel(logging.INFO)
    train_grpo(**vars(settings))
    folder = Path(settings.output_dir)
    compared = (folder / "comparison.md").read_text(encoding="utf-8")
    return (
        f"{compared}\nthe model is in {folder}/model, results in {folder}/results.json, curves in {folder}/rewards.png"
    )


def queue(configs: list[str], options: list[str]) -> str:
    """Train by several YAML files, one after the other, each in a process of its own; one that fails stops none.

    Args:
        configs: YAML files, as for `train --config`.
        options: further options of `train` for all of them, such as `--max_steps 100`, behind the files.
    """
    if not configs:
        raise UserMistake("queue: name YAML files, such as `smollm-trm queue configs/gsm_cot.yaml own.yaml`")
    told = []
    for config in configs:
        print(f"== {config}", flush=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "smollm_trm", "train", "--config", config, *options], check=False)
        how = "trained" if done.returncode == 0 else f"failed (exit code {done.returncode})"
        told.append(f"{config}: {how} in {(time.perf_counter() - started) / 60:.1f} minutes")
    report = "\n".join(told)
    if failed := sum(": failed" in line for line in told):
        print(report)
        raise UserMistake(f"{failed} of {len(configs)} runs failed; the others are done, the same command repeats it")
    return report


def prepare_icot(data_dir: str | None = None, output_dir: str = "data/gsm_icot") -> str:
    """Write train.jsonl and test.jsonl whose solutions are steps alone, such as `<<48/2=24>>`.

    Args:
        data_dir: folder with GSM8K's train.jsonl and test.jsonl, or with the published iCoT text (train.txt,
            valid.txt, test.txt: `question||step step #### answer`); without it GSM8K_DIR, then the Hub.
        output_dir: the files go here; `train --data_dir` reads them.
    """
    from smollm_trm.data.icot import prepare_icot_files

    return prepare_icot_files(data_dir, Path(output_dir))


def demo(output_dir: str = "outputs/demo", seed: int = 0, progress: bool = True) -> None:
    """The main job in miniature: train a tiny base, LoRA and LoRA + TRM on word problems, compare, save, ask.

    Args:
        output_dir: everything goes here.
        seed: fixes every figure.
        progress: show progress bars.
    """
    from smollm_trm.demo import run_demo

    try:
        run_demo(output_dir=output_dir, seed=seed, progress=progress)
    except UserMistake as error:  # of one of its runs, which have more options than it
        raise UserMistake(str(error).replace("resume='never'", f"remove {output_dir}")) from error

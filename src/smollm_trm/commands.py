"""The commands of `smollm-trm` but for those of the subpackages: typed functions whose docstrings are their help.

Each imports what it needs when it runs, so that help and mistakes are quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from smollm_trm.records import UserMistake, run_record, without_local_paths, write_json

if TYPE_CHECKING:
    from smollm_trm.training.settings import TrainSettings


def evaluate(
    model: str,
    part: str = "dev",
    data_dir: str | None = None,
    dataset_path: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    latents: str = "own",
    samples_per_problem: int = 1,
    target: str = "steps",
    prompt_format: str = "plain",
    seed: int = 42,
    output_dir: str | None = None,
) -> None:
    """Answer problems with a saved model or an untuned base, and grade them.

    Args:
        model: folder of a saved model or of a training run, or a base model by name or folder.
        part: "dev" (the 20% part) or "test" (the official test set, for the final evaluation).
        data_dir: folder with GSM8K's train.jsonl and test.jsonl; without it GSM8K_DIR, then the Hub.
        dataset_path: own data instead of GSM8K.
        max_samples: only the first so many problems; None for all.
        batch_size: problems generated at once.
        max_new_tokens: limit of each answer; None makes room for the longest gold solution.
        latents: "own", or "shuffled" (each problem gets another's latents: a control).
        samples_per_problem: above 1, answers are sampled and the commonest counts.
        target: what an untuned base is to write, "steps" or "answer".
        prompt_format: how an untuned base is asked, "plain" or "chat".
        seed: of the split, the sampling and the shuffle.
        output_dir: results and predictions go here; None puts them beside the model.
    """
    from smollm_trm.evaluation.evaluate import evaluate_gsm8k
    from smollm_trm.evaluation.halting import judge_halting
    from smollm_trm.evaluation.loading import load_for_evaluation, problems_of
    from smollm_trm.models.hub import add_evaluation
    from smollm_trm.models.storage import local_model_folder

    rows, split = problems_of(part, data_dir=data_dir, dataset_path=dataset_path, seed=seed, models=[model])
    loaded = load_for_evaluation(model, target=target, prompt_format=prompt_format)
    name = part if dataset_path is None else Path(dataset_path).stem
    saved = local_model_folder(model)
    beside = Path("outputs") / Path(model).name if saved is None else Path(model)
    stem = name if latents == "own" else f"{name}_{latents}"
    predictions = (Path(output_dir) if output_dir else beside / "evaluation") / f"{stem}.jsonl"
    result = evaluate_gsm8k(
        loaded,
        rows,
        max_samples,
        batch_size,
        max_new_tokens=max_new_tokens,
        latents=latents,
        samples_per_problem=samples_per_problem,
        seed=seed,
        predictions_path=predictions,
    )
    halting = judge_halting(loaded, rows, result["correct_by_problem"]) if latents == "own" else None
    report = {"part": name, "model": without_local_paths(model), "seed": seed, "split": split, **result}
    report |= {"predictions_path": predictions.name, "halting": halting, **run_record()}
    write_json(predictions.with_suffix(".json"), report)
    if saved is not None and latents == "own" and max_samples is None:
        add_evaluation(saved, name, result)
    label = name if latents == "own" else f"{name} with latents {latents}"
    print(evaluation_lines(label, result, halting, trained_on_losses=loaded.config.target == "steps"))
    print(f"results in {predictions.with_suffix('.json')}")


def evaluation_lines(label: str, result: dict, halting: dict | None, *, trained_on_losses: bool) -> str:
    """The scores of `evaluate_gsm8k` and of `judge_halting` in words."""
    low, high = result["interval"]
    scores = (
        f"{label}: {100 * result['accuracy']:.1f}% of {result['total']} problems "
        f"(95% interval {100 * low:.1f} to {100 * high:.1f}), strict {100 * result['strict_accuracy']:.1f}%"
    )
    if halting is None:
        return scores
    judged = "right answers" + (", though trained on losses" if trained_on_losses else "")
    auroc = "not defined (all alike)" if halting["auroc"] is None else f"{halting['auroc']:.2f}"
    return (
        f"{scores}\nhalting head: AUROC {auroc} for {judged} (base rate {halting['base_rate']:.2f}), would stop after "
        f"{halting['mean_steps']:.1f} of {halting['steps']} steps"
    )


def compare(
    *,
    models: dict[str, str],
    baseline: str | None = None,
    part: str = "dev",
    data_dir: str | None = None,
    dataset_path: str | None = None,
    max_samples: int | None = None,
    batch_size: int = 32,
    target: str = "steps",
    prompt_format: str = "plain",
    seed: int = 42,
    output_dir: str = "outputs/comparison",
) -> None:
    """Evaluate several models on the same problems, shuffled latents included; print a table, draw a plot.

    Args:
        models: arm names and their folders, such as '{"base": "HuggingFaceTB/SmolLM3-3B", "TRM": "outputs/run"}'.
        baseline: the arm that differences are taken from; the first when None.
        part: "dev" (the 20% part) or "test" (the official test set, for the final evaluation).
        data_dir: folder with GSM8K's train.jsonl and test.jsonl; without it GSM8K_DIR, then the Hub.
        dataset_path: own data instead of GSM8K.
        max_samples: only the first so many problems; None for all.
        batch_size: problems generated at once.
        target: what an untuned base is to write, "steps" or "answer".
        prompt_format: how an untuned base is asked, "plain" or "chat".
        seed: of the split and the shuffle.
        output_dir: predictions, table and plot go here.
    """
    from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
    from smollm_trm.evaluation.loading import load_for_evaluation, problems_of

    if not models:
        raise UserMistake("models: name at least one arm, such as --models.TRM outputs/run")
    if baseline is not None and baseline not in models:
        raise UserMistake(f"baseline={baseline!r}: choose one of the arms, {', '.join(models)}")
    places = list(models.values())
    rows, split = problems_of(part, data_dir=data_dir, dataset_path=dataset_path, seed=seed, models=places)
    folder = Path(output_dir)
    results, loaded = {}, None
    for name, place in models.items():
        print(name)
        del loaded  # or two bases stand in memory at once
        loaded = load_for_evaluation(place, target=target, prompt_format=prompt_format)
        results |= evaluate_arm(name, loaded, rows, folder, max_samples=max_samples, batch_size=batch_size, seed=seed)
    shown = {name: without_local_paths(place) for name, place in models.items()}
    record = {"part": part, "seed": seed, "models": shown, "split": split}
    comparison = report_comparison(results, folder, baseline=baseline or next(iter(models)), **record)
    print(f"{part}\n{comparison}\nplot in {folder / 'comparison.png'}")


def ask(
    model: str,
    question: str,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    target: str = "steps",
    prompt_format: str = "plain",
) -> None:
    """Answer one question.

    Args:
        model: folder of a saved model or of a training run, or a base model by name or folder.
        question: a bare question.
        max_new_tokens: tokens to generate at most.
        temperature: 0 is greedy.
        target: what an untuned base is to write, "steps" or "answer".
        prompt_format: how an untuned base is asked, "plain" or "chat".
    """
    from smollm_trm.evaluation.loading import load_for_evaluation

    if not question.strip():
        raise UserMistake("question: it is empty")
    loaded = load_for_evaluation(model, target=target, prompt_format=prompt_format)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    print(loaded.generate_with_thinking(question, max_new_tokens=max_new_tokens, **sampling).strip())


def push(model: str, repo_id: str, private: bool = True, dry_run: bool = False) -> None:
    """Upload a saved model to the Hub, with a card that states what was measured.

    Args:
        model: folder of a saved model or of a training run.
        repo_id: "owner/name".
        private: whether a new repository is private.
        dry_run: write the card and list the files, upload nothing.
    """
    from smollm_trm.models.hub import push_model
    from smollm_trm.models.storage import saved_model_folder

    files = push_model(saved_model_folder(model), repo_id, private=private, dry_run=dry_run)
    print(f"{'would push' if dry_run else 'pushed'} to {repo_id}: {', '.join(files)}")


def train(settings: "TrainSettings") -> None:
    """Train LoRA and a reasoner, on GSM8K unless told otherwise."""
    from smollm_trm.finetune import train_gsm8k

    trainer, _ = train_gsm8k(**vars(settings))
    if trainer.is_global_zero:
        print(f"the model is in {Path(settings.output_dir) / 'model'}, results in {settings.output_dir}/results.json")


def demo(output_dir: str = "outputs/demo", seed: int = 0, progress: bool = True) -> None:
    """The main job in miniature: train a tiny base, LoRA and LoRA + TRM on word problems, compare, save, ask.

    Args:
        output_dir: everything goes here.
        seed: fixes every figure.
        progress: show progress bars.
    """
    from smollm_trm.demo import run_demo

    run_demo(output_dir=output_dir, seed=seed, progress=progress)

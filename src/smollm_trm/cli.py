"""`smollm-trm <command>`: one typed function a command, its docstring the help, everything imported on demand."""

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from smollm_trm.records import run_record, write_json
from smollm_trm.training.settings import TrainSettings

SMOLLM3 = "HuggingFaceTB/SmolLM3-3B"


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
    folder = Path(output_dir) if output_dir else beside / "evaluation"
    stem = name if latents == "own" else f"{name}_{latents}"
    result = evaluate_gsm8k(
        loaded,
        rows,
        max_samples,
        batch_size,
        max_new_tokens=max_new_tokens,
        latents=latents,
        samples_per_problem=samples_per_problem,
        seed=seed,
        predictions_path=folder / f"{stem}.jsonl",
    )
    halting = judge_halting(loaded, rows, result["correct_by_problem"]) if latents == "own" else None
    report = {"part": name, "model": model, "seed": seed, "split": split, **result, "halting": halting, **run_record()}
    write_json(folder / f"{stem}.json", report)
    if saved is not None and latents == "own" and max_samples is None:
        add_evaluation(saved, name, result)
    low, high = result["interval"]
    print(
        f"{name}{'' if latents == 'own' else ' with latents ' + latents}: {100 * result['accuracy']:.1f}% of "
        f"{result['total']} problems (95% interval {100 * low:.1f} to {100 * high:.1f}), strict "
        f"{100 * result['strict_accuracy']:.1f}%"
    )
    if halting is not None:
        judged = "right answers" + (", though trained on losses" if loaded.config.target == "steps" else "")
        auroc = "not defined (all alike)" if halting["auroc"] is None else f"{halting['auroc']:.2f}"
        print(
            f"halting head: AUROC {auroc} for {judged} (base rate {halting['base_rate']:.2f}), would stop after "
            f"{halting['mean_steps']:.1f} of {halting['steps']} steps"
        )
    print(f"results in {folder / f'{stem}.json'}")


def compare(
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
        raise ValueError("models: name at least one arm, such as --models.TRM outputs/run")
    if baseline is not None and baseline not in models:
        raise ValueError(f"baseline={baseline!r}: choose one of the arms, {', '.join(models)}")
    places = list(models.values())
    rows, split = problems_of(part, data_dir=data_dir, dataset_path=dataset_path, seed=seed, models=places)
    folder = Path(output_dir)
    results, loaded = {}, None
    for name, place in models.items():
        print(name)
        del loaded  # or two bases stand in memory at once
        loaded = load_for_evaluation(place, target=target, prompt_format=prompt_format)
        results |= evaluate_arm(name, loaded, rows, folder, max_samples=max_samples, batch_size=batch_size, seed=seed)
    record = {"part": part, "seed": seed, "models": models, "split": split}
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
        raise ValueError("question: it is empty")
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


def train_command(settings: TrainSettings) -> None:
    """Train LoRA and a reasoner."""
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


COMMANDS: dict[str, Callable[..., str | None]] = {
    "demo": demo,
    "evaluate": evaluate,
    "compare": compare,
    "ask": ask,
    "push": push,
}
ARITHMETIC = {
    "generate": "Write data for the arithmetic model.",
    "train": "Train the arithmetic model from scratch.",
    "evaluate": "Grade an arithmetic model: exact match, tokens, chains.",
    "interactive": "Type sums, watch the model think.",
}
BY_OPTION_ONLY = ("compare", *(f"arithmetic {name}" for name in ARITHMETIC))
"""Commands whose required arguments are options too (`--models.NAME FOLDER`, `--checkpoint FILE`)."""


class OneLineParser(ArgumentParser):
    """A parser whose refusals are one line with the nearest right name, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Print one line and leave."""
        text = " ".join(str(message).split())
        for name in [word for word in text.replace(",", " ").split() if word.startswith("--")]:
            options = [option for action in self._actions for option in action.option_strings]
            nearest = difflib.get_close_matches(name.split("=")[0], options, n=1)
            if nearest and nearest[0] != name.split("=")[0]:
                text += f"; did you mean {nearest[0]}?"
                break
        sys.stderr.write(f"smollm-trm: {text}\n")
        raise SystemExit(2)


def described_commands() -> dict[str, str]:
    """Every command and its one line."""
    found = {"train": "Train LoRA and a reasoner, on GSM8K unless told otherwise."}
    found |= {name: (command.__doc__ or "").split("\n")[0] for name, command in COMMANDS.items()}
    return found | {f"arithmetic {name}": line for name, line in ARITHMETIC.items()}


def command_function(name: str) -> Callable[..., str | None]:
    """The function of a command; the arithmetic room is imported only when it is entered."""
    if name in COMMANDS:
        return COMMANDS[name]
    commands = import_module("smollm_trm.arithmetic.commands")
    return getattr(commands, f"{name.removeprefix('arithmetic ')}_arithmetic")


def command_parser(name: str) -> OneLineParser:
    """The parser of one command, with `--config file.yaml` and `--print_config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its help
    parser = OneLineParser(prog=f"smollm-trm {name}", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.description = described_commands()[name]
    if name == "train":
        parser.add_class_arguments(TrainSettings)
    else:
        parser.add_function_arguments(command_function(name), as_positional=name not in BY_OPTION_ONLY)
    return parser


def tidy_arguments(parser: OneLineParser, arguments: Sequence[str]) -> list[str]:
    """Hyphens in option names count as underscores, and a switch may stand alone (`--fp16`)."""
    switches = {
        option
        for action in parser._actions
        if getattr(action, "_typehint", None) is bool
        for option in action.option_strings
    }
    tidy: list[str] = []
    for at, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
            following = arguments[at + 1].lower() if at + 1 < len(arguments) else ""
            if argument in switches and following not in ("true", "false", "yes", "no"):
                argument += "=true"
        tidy.append(argument)
    return tidy


def usage() -> str:
    """One line a command."""
    lines = ["usage: smollm-trm <command> [options]   (smollm-trm <command> --help)", ""]
    return "\n".join([*lines, *(f"  {name:<22} {text}" for name, text in described_commands().items())])


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Parse and run one command."""
    parser = command_parser(name)
    values: dict[str, Any] = parser.parse_args(tidy_arguments(parser, arguments)).as_dict()
    values.pop("config", None)
    if name == "train":
        train_command(TrainSettings(**values))
    else:
        report = command_function(name)(**values)
        if report:
            print(report)


def split_command(given: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, one word or two, and its arguments.

    Raises:
        ValueError: no such command; one line with the nearest right one.
    """
    known = list(described_commands())
    length = 2 if given[0] == "arithmetic" and len(given) > 1 else 1
    name = " ".join(given[:length])
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise ValueError(f"unknown command {name!r}; {hint}")
    return name, list(given[length:])


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. A mistake of the user's is one line on standard error and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return
    try:
        run_command(*split_command(given))
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("out of memory"):
            raise
        sys.stderr.write(f"smollm-trm: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("smollm-trm: stopped; the same command goes on from the last checkpoint\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

"""`smollm-trm <command>`: one typed function a command, imported when it is asked for; one line a mistake."""

import difflib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from smollm_trm.records import UserMistake, first_line, installed_versions

HELP = ("-h", "--help")


class Command(NamedTuple):
    """Where a command's function is, and its line in the list of commands."""

    function: str
    """`module:function` below `smollm_trm`; what it returns is printed."""
    line: str
    """What it does."""
    settings: str | None = None
    """`module:dataclass` whose fields are the options; the function is given one. None: its arguments are."""


COMMANDS = {
    "demo": Command("commands:demo", "The main job in miniature, from a tiny base to a table and a plot."),
    "train": Command("commands:train", "Train LoRA and a reasoner.", "training.settings:TrainSettings"),
    "evaluate": Command("commands:evaluate", "Answer problems with a saved model or an untuned base, and grade them."),
    "compare": Command("commands:compare", "Evaluate several models on the same problems, shuffled latents included."),
    "ask": Command("commands:ask", "Answer one question."),
    "push": Command("commands:push", "Upload a saved model to the Hub, with a card that states what was measured."),
    "arithmetic generate": Command("arithmetic.commands:generate_arithmetic", "Write data for the arithmetic model."),
    "arithmetic train": Command("arithmetic.commands:train_arithmetic", "Train the arithmetic model from scratch."),
    "arithmetic evaluate": Command("arithmetic.commands:evaluate_arithmetic", "Grade it: exact match, tokens, chains."),
    "arithmetic interactive": Command("arithmetic.commands:interactive_arithmetic", "Type sums, watch it think."),
}


class OneLineParser(ArgumentParser):
    """A parser whose refusals are one line with the nearest right name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        """Raise a UserMistake."""
        text = " ".join(str(message).split())
        options = [option for action in self._actions for option in action.option_strings]
        for word in text.replace(",", " ").split():
            name = word.split("=")[0].rstrip(":")
            nearest = difflib.get_close_matches(name, options, n=1) if name.startswith("--") else []
            if nearest and nearest[0] != name:
                raise UserMistake(f"{text}; did you mean {nearest[0]}?") from ex
        raise UserMistake(text) from ex


def imported(place: str) -> Any:
    """What stands at `module:name` below this package."""
    module, name = place.split(":")
    return getattr(import_module(f"smollm_trm.{module}"), name)


def command_parser(name: str) -> OneLineParser:
    """The parser of one command, with `--config file.yaml` and `--print_config`.

    Required arguments are positional, but for those that the function takes by keyword only.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its help
    command = COMMANDS[name]
    parser = OneLineParser(prog=f"smollm-trm {name}", description=command.line, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    if command.settings:
        parser.add_class_arguments(imported(command.settings))
    else:
        function = imported(command.function)
        kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        parser.add_function_arguments(function, as_positional=inspect.Parameter.KEYWORD_ONLY not in kinds)
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


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Parse and run one command."""
    parser, command = command_parser(name), COMMANDS[name]
    values: dict[str, Any] = parser.parse_args(tidy_arguments(parser, arguments)).as_dict()
    values.pop("config", None)
    function = imported(command.function)
    report = function(imported(command.settings)(**values)) if command.settings else function(**values)
    if report:
        print(report)


def usage(group: str = "") -> str:
    """One line a command, of all or of a group such as `arithmetic`."""
    called = f"smollm-trm {group} <command>" if group else "smollm-trm <command>"
    found = {name: command.line for name, command in COMMANDS.items() if not group or name.startswith(f"{group} ")}
    width = max(map(len, found))
    lines = [f"  {name:<{width}}  {line}" for name, line in found.items()]
    everywhere = "--debug shows the traceback of whatever stops a command, --version the versions"
    return "\n".join([f"usage: {called} [options]   ({called} --help)", "", *lines, "", everywhere])


def dispatch(given: Sequence[str]) -> None:
    """Run what was asked for: a command of one word or two, the help of all or of a group, or the version.

    Raises:
        UserMistake: no such command; one line with the nearest right one.
    """
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    grouped = bool(given) and given[0] in groups
    words = 2 if grouped else 1
    name = " ".join(given[:words])
    if "--version" in given:
        found = installed_versions()
        ours = found.pop("smollm-trm", "(not installed)")
        print(f"smollm-trm {ours}: {', '.join(' '.join(package) for package in found.items())}")
    elif len(given) < words or given[words - 1] in HELP:
        print(usage(given[0] if grouped else ""))
    elif name in COMMANDS:
        run_command(name, given[words:])
    else:
        known = [*COMMANDS, *groups]
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"
        raise UserMistake(f"unknown command {name!r}; {hint}")


def is_told_in_a_line(error: Exception) -> bool:
    """Whether an error says to the user what to do: a mistake of theirs, a file, their memory, a run that diverged.

    An OSError counts where it names a file or where the message is ours; a broken pipe, say, has an errno alone.
    """
    if isinstance(error, OSError):
        return error.errno is None or error.filename is not None
    out_of_memory = isinstance(error, RuntimeError) and str(error).startswith("out of memory")
    return out_of_memory or isinstance(error, (UserMistake, FloatingPointError))


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: a mistake of the user's is one line on standard error and exit code 2, a bug has its traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        dispatch([argument for argument in given if argument != "--debug"])
    except Exception as error:
        if debug or not is_told_in_a_line(error):
            raise
        sys.stderr.write(f"smollm-trm: {first_line(error)}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stderr.write("smollm-trm: stopped; the same command goes on from the last checkpoint\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

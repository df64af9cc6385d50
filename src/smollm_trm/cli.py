"""`smollm-trm <command>`: one typed function a command, imported when it is asked for; one line a mistake."""

import difflib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from smollm_trm.records import AboveBars, UserMistake, first_line, installed_versions, name_hint, settings_from

DEEPEST = 20
LONGEST_LINE = 1000


class Command(NamedTuple):
    """A command by its function (`module:name` in this package; what it returns is printed) and its line of help."""

    function: str
    line: str
    settings: str | None = None  # the dataclass whose fields are the options; without one the function's arguments are
    config_reader: str | None = None  # a function from a `--config` file's path to YAML, where it may have other keys
    help_groups: str | None = None  # headings of the options by the first of each; then what holds fields of its own
    last: str | None = None  # an argument that is given by its place, and may be left out


COMMANDS = {
    "demo": Command("commands:demo", "The main job in miniature, from a tiny base to a table and a plot."),
    "train": Command(
        "commands:train",
        "Train LoRA and a reasoner.",
        "training.settings:TrainSettings",
        "training.reference_keys:read_config_file",
        "training.settings:HELP_GROUPS",
    ),
    "grpo": Command(
        "commands:grpo", "Train a saved model on the grades of its own answers.", "training.grpo_settings:GRPOSettings"
    ),
    "queue": Command("commands:queue", "Train by several YAML files, one after the other; one that fails stops none."),
    "evaluate": Command("commands:evaluate", "Let a saved model or base answer problems.", "commands:EvaluateSettings"),
    "compare": Command("commands:compare", "Evaluate several models on the same problems.", "commands:CompareSettings"),
    "lm-eval": Command("commands:lm_eval", "Let EleutherAI's harness ask and grade it.", "commands:LmEvalSettings"),
    "ask": Command(
        "commands:ask", "Answer one question, or every one that is typed.", "commands:AskSettings", last="question"
    ),
    "push": Command("commands:push", "Upload a saved model to the Hub, with a card that states what was measured."),
    "prepare icot": Command("commands:prepare_icot", "Write data whose solutions are steps alone, from annotations."),
    "phases compressor": Command(
        "phases.compressor:compressor_command",
        "Phase 1: compress a base's hidden states; what is lost.",
        "phases.settings:CompressorRunSettings",
    ),
    "phases datagen": Command(
        "phases.datagen:datagen_command",
        "Phase 2: let a model think in text, keep its states before and after.",
        "phases.settings:DatagenSettings",
    ),
    "phases trm": Command(
        "phases.trm:trm_command",
        "Phase 2: learn the state after thinking from those before.",
        "phases.settings:SequenceSettings",
    ),
    "phases assemble": Command(
        "phases.assemble:assemble_command",
        "Teach a base to read such states, and put both phases into one model.",
        "phases.settings:AssembleSettings",
    ),
    "phases compare": Command(
        "phases.states:compare_states_command",
        "The assembled model against thinking in text, true, mean and other states.",
        "phases.settings:CompareStatesSettings",
    ),
    "arithmetic generate": Command(
        "arithmetic.commands:generate_arithmetic",
        "Write data for the arithmetic model.",
        "arithmetic.settings:SumSettings",
    ),
    "arithmetic train": Command(
        "arithmetic.commands:train_arithmetic", "Train the arithmetic model.", "arithmetic.settings:SumTrainingSettings"
    ),
    "arithmetic evaluate": Command("arithmetic.commands:evaluate_arithmetic", "Grade it: exact match, tokens, chains."),
    "arithmetic interactive": Command("arithmetic.commands:interactive_arithmetic", "Type sums, watch it think."),
}


class OneLineParser(ArgumentParser):
    """A parser whose refusals are one line with the nearest right name, and whose help may be in groups."""

    def group_help(self, headings: Mapping[str, str], nested: Mapping[str, type]) -> None:
        """Give options headings, each before the first of its group, and show the fields of those that hold some."""
        self.usage, self.epilog = "%(prog)s [options]", ""
        options, group = self._action_groups[-1]._group_actions, None
        for action in list(options):
            group = self.add_argument_group(headings[action.dest]) if action.dest in headings else group
            group._group_actions.append(action)
        options.clear()
        self.nested = nested

    nested: Mapping[str, type] = {}

    def format_help(self) -> str:
        """argparse's help, and below it the fields of what holds some."""
        texts = [super().format_help()]
        for name, kind in self.nested.items():
            fields = ArgumentParser(add_help=False, usage=" ")
            fields.add_class_arguments(kind, name, as_group=False)
            text = fields.format_help()
            texts.append(f"fields of --{name}:\n{text[text.index(f'  --{name}.') :]}")
        return "\n".join(texts)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        text = " ".join(str(message).split())[:LONGEST_LINE]
        options = [option for action in self._actions for option in action.option_strings]
        in_file = re.match(r"Option '(\w+)' is not accepted", text)  # of a YAML file
        for word in [f"--{in_file[1]}"] if in_file else text.replace(",", " ").split():
            name = word.split("=")[0].rstrip(":")
            nearest = difflib.get_close_matches(name, options, n=1) if name.startswith("--") else []
            if nearest and nearest[0] != name:
                raise UserMistake(f"{text}; did you mean {nearest[0].removeprefix('--' if in_file else '')}?") from ex
        raise UserMistake(text) from ex


def imported(place: str) -> Any:
    """What stands at `module:name` below this package."""
    module, name = place.split(":")
    return getattr(import_module(f"smollm_trm.{module}"), name)


def command_parser(name: str) -> OneLineParser:
    """The parser of one command, with `--config file.yaml` and `--print_config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # a field's docstring is its help
    command = COMMANDS[name]
    parser = OneLineParser(prog=f"smollm-trm {name}", description=command.line, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add = parser.add_class_arguments if command.settings else parser.add_function_arguments
    add(imported(command.settings or command.function), as_positional=True, skip={command.last} - {None})
    if command.help_groups:
        parser.group_help(*imported(command.help_groups))
    if command.last:
        parser.add_argument(command.last, nargs="?", type=str, help="Answered at once; without it, what is typed is.")
    return parser


def tidy_arguments(parser: OneLineParser, arguments: Sequence[str]) -> list[str]:
    """Hyphens in option names count as underscores, a switch may stand alone (`--fp16`); `--config=FILE` is one."""
    of_bool = [action for action in parser._actions if getattr(action, "_typehint", None) is bool]
    switches = {option for action in of_bool for option in action.option_strings}
    tidy: list[str] = []
    for at, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
            following = arguments[at + 1].lower() if at + 1 < len(arguments) else ""
            if argument in switches and following not in ("true", "false", "yes", "no"):
                argument += "=true"
        if tidy and tidy[-1] == "--config":
            argument = f"{tidy.pop()}={argument}"
        tidy.append(argument)
    return tidy


def refuse_traps(arguments: Sequence[str]) -> None:
    """Refuse, before anything parses them, settings that take for ever: nested without end, or YAML aliases."""
    files = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    for file in filter(os.path.isfile, files):
        depth, told = 0, f"{file}: aliases and more than {DEEPEST} levels are refused; write it plainly"
        try:
            with open(file, encoding="utf-8") as opened:
                for event in yaml.parse(opened, Loader=yaml.SafeLoader):
                    depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                    if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
                        raise UserMistake(told)
        except (yaml.YAMLError, UnicodeError, RecursionError) as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
            where = f"{file}, line {mark.line + 1}" if mark else file
            told = f"{where}: not a YAML file that can be read ({' '.join(str(problem).split())})"
            raise UserMistake(told) from error
    for argument in arguments:
        if argument != argument.encode(errors="ignore").decode():
            raise UserMistake(f"{argument[:40]!r}: it holds bytes that are not UTF-8 text")
        if argument.count("[") + argument.count("{") > 1000:
            raise UserMistake(f"{argument[:40]!r}...: more brackets than a setting has")


def run_command(name: str, arguments: Sequence[str]) -> None:
    parser, command = command_parser(name), COMMANDS[name]
    arguments = tidy_arguments(parser, arguments)
    refuse_traps(arguments)
    if name == "queue":  # files as they come, then options for all of them
        n_files = next((at for at, one in enumerate(arguments) if one.startswith("-")), len(arguments))
        files, options = list(arguments[:n_files]), list(arguments[n_files:])
        if options[:1] not in (["-h"], ["--help"]):
            print(imported(command.function)(files, options))
            return
    if command.config_reader is not None:
        read = imported(command.config_reader)
        arguments = [re.sub("^--config=(.*)", lambda file: f"--config={read(file[1])}", one) for one in arguments]
    values: dict[str, Any] = parser.parse_args(arguments).as_dict()
    values.pop("config", None)
    function = imported(command.function)
    try:
        if command.settings:
            report = function(settings_from(imported(command.settings), values, name))
        else:
            report = function(**values)
    except Exception as error:
        error.options = list(values)
        raise
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
    """Run what was asked for: a command of one word or two, the help of all or of a group, or the version."""
    groups = {name.split()[0] for name in COMMANDS if " " in name}
    group = given[0] if given and given[0] in groups else ""
    words = 2 if group else 1
    name = " ".join(given[:words])
    if "--version" in given:
        found = installed_versions()
        ours = found.pop("smollm-trm", "(not installed)")
        print(f"smollm-trm {ours}: {', '.join(' '.join(package) for package in found.items())}")
    elif len(given) < words or given[words - 1] in ("-h", "--help"):
        print(usage(group))
    elif name in COMMANDS:
        run_command(name, given[words:])
    else:
        raise UserMistake(f"unknown command {name!r}; {name_hint(name, [*COMMANDS, *groups])}")


def is_told_in_a_line(error: BaseException) -> bool:
    """Whether an error says what to do: a user's mistake, a file, their memory, a run that diverged or was stopped."""
    if isinstance(error, OSError):  # one that names a file, or ours; a broken pipe, say, has an errno alone
        return error.errno is None or error.filename is not None
    return is_out_of_memory(error) or isinstance(error, (UserMistake, FloatingPointError, KeyboardInterrupt))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is ours about memory, Python's, or what torch says on a CPU and on a GPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def told_of(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "stopped; the same command goes on from what was kept, if it keeps anything"
    asked = re.search(r"tried to allocate (\d+) bytes", str(error)) or re.search(r"you need (\d+) bytes", str(error))
    if asked:
        return f"too large: {int(asked[1]) / 2**30:,.1f} GiB were asked for at once; choose smaller sizes"
    options = "|".join(getattr(error, "options", None) or ["(?!)"])  # a message that means one names it as typed
    as_typed = rf"(?<![\w./'\"-])(?=(?:{options})(?:=|\b(?![/.]\w)))(?=\w+(?:=|_))"
    return re.sub(as_typed, "--", first_line(error))[:LONGEST_LINE]


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: a mistake of the user's is one line on standard error and exit code 2, a bug has its traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=AboveBars())
        warnings.filterwarnings("ignore", category=FutureWarning)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        dispatch([argument for argument in given if argument != "--debug"])
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given or not is_told_in_a_line(error):
            raise
        sys.stderr.write(f"smollm-trm: {told_of(error)}\n".encode("utf-8", "replace").decode())
        raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None

"""What each run needs on a T4: settings, memory and time in one table, each figure with how it was found.

Everything between these markers is written by the build. In a notebook's own text the name is left out, and the
table holds `quick` and `full` only; in a guide it holds the recipes too.

    <!-- needs: smollm_trm_colab.ipynb -->
    <!-- /needs -->

Settings come from the notebook's own `RUNS` and `AROUND`, memory from the last `t4_memory` line of
`benchmarks/results.jsonl`, and time from token counts and assumed speeds: neither was measured on a T4.
"""

import ast
import json
import re
from pathlib import Path

from library import BuildError
from nbformat import NotebookNode

NEEDS = re.compile(r"(<!-- needs(?:: (\S+))? -->\n).*?(<!-- /needs -->)", re.DOTALL)
TRAINED = (750, 450)  # tokens/s of a 3B model with LoRA and checkpointing
ANSWERED = (0.9, 1.4)  # seconds a problem: 230-320 tokens/s in batches of 32
AROUND_IT = (5, 10)  # minutes: installing, downloading 6 GB, loading
TRAIN_ROWS, DEV_ROWS = 5978, 1495
ROW, QUESTION = 163, 57  # mean tokens of a training row, and of its question
AT_ONCE = 12  # tokens of a row that are no question, where the answer is given at once
FORWARD = 1 / 3  # cost of a pass without gradient beside one with it
SAYING = 0.09  # cost of asking a latent for a word, the vocabulary's part of SmolLM3, beside a token's
ROWS_ALONE = 32  # of a step of the reasoner alone
HALTING = 4 / 16  # such passes a batch, for the halting head: 4 of them every 16th batch
REMEDY = "run 'python benchmarks/t4_memory.py --record', then 'make notebook'"
HEAD = (
    "run",
    "latents",
    "rows a batch",
    "peak memory, GiB (**traced**)",
    "training (**estimated**)",
    "answering the dev problems (**estimated**)",
)


def filled_needs(text: str, notebooks: dict[str | None, list[NotebookNode]], results: Path) -> str:
    """A text with its tables of needs written anew.

    Args:
        text: Markdown.
        notebooks: the cells of each notebook that a marker may name; under None those of the text's own.
        results: `benchmarks/results.jsonl`.
    """

    def filled(match: re.Match) -> str:
        return f"{match[1]}{needs_table(notebooks[match[2]], results, recipes=bool(match[2]))}\n{match[3]}"

    return NEEDS.sub(filled, text)


def needs_table(cells: list[NotebookNode], results: Path, *, recipes: bool) -> str:
    """The table, and a line with what a whole run takes.

    Raises:
        BuildError: nothing is recorded, or it was recorded with other settings than the notebook has now.
    """
    runs = settings_of(cells)
    rows = []
    for name, traced in recorded(results).items():
        now = {"use_trm": True, **runs[traced["run"]], **traced["changes"]}
        for key, value in traced["settings"].items():
            if key in now and value != now[key]:
                raise BuildError(f"{results.name}: t4_memory has {key}={value} for {name}, not {now[key]}; {REMEDY}")
        if recipes or traced["changes"].keys() <= {"use_trm"}:
            rows.append(needs_row(name, traced, now))
    whole = [f"`{run}` {span(*whole_minutes(runs[run]))}" for run in ("quick", "full")]
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\nA whole run, both arms trained and all arms answered (**estimated**): {', '.join(whole)}."


def needs_row(name: str, traced: dict, now: dict) -> tuple[str, ...]:
    """One run's row; no time where a change makes the token count say little about it."""
    latents = now["num_latents"] if now["use_trm"] else 0
    batch = str(now["batch_size"])
    peak = f"{traced['peak']:.1f}, in {traced['where']}"
    if not traced["changes"].keys() <= {"use_trm", "num_latents"}:
        return (name, str(latents), batch, peak, "", "")
    arms = "" if not latents else "twice "
    return (
        name,
        str(latents or "none"),
        batch,
        peak,
        span(*training_minutes(now, latents)),
        arms + span(*answering_minutes(now)),
    )


def runs_table(cells: list[NotebookNode]) -> str:
    """The settings of `RUNS`, a row a setting, a column a run."""
    runs = _tables(cells)["RUNS"]
    names = dict.fromkeys(name for values in runs.values() for name in values)
    lines = [("setting", *(f"`{run}`" for run in runs)), ("---",) * (1 + len(runs))]
    lines += [(f"`{name}`", *(_shown(values.get(name)) for values in runs.values())) for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: object) -> str:
    """A setting's value in a table; nothing where a run leaves it as the library has it."""
    return "" if value is None else str(value).rpartition("/")[2]


def settings_of(cells: list[NotebookNode]) -> dict[str, dict]:
    """`RUNS` and `AROUND` of a notebook, together by run."""
    tables = _tables(cells)
    return {run: {**values, **tables["AROUND"][run]} for run, values in tables["RUNS"].items()}


def _tables(cells: list[NotebookNode]) -> dict[str, dict]:
    """`RUNS` and `AROUND` as they are written."""
    tables: dict[str, dict] = {}
    for cell in cells:
        if cell.cell_type == "code" and "\nAROUND = {" in cell.source:
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("RUNS", "AROUND"):
                    tables[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    return tables


def recorded(results: Path) -> dict[str, dict]:
    """The last `t4_memory` measurement: run -> what it started from, changed, and needed."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    found = [line for line in map(json.loads, lines) if line["name"] == "t4_memory"]
    if not found:
        raise BuildError(f"{results.name} holds no t4_memory; {REMEDY}")
    return found[-1]["figures"]


def training_minutes(settings: dict, latents: int) -> tuple[float, float]:
    """Of one arm: all tokens that pass, those without gradient counted as a third."""
    at_once = settings.get("target") == "answer"
    row, reading = (QUESTION + AT_ONCE if at_once else ROW) + latents, QUESTION if latents else 0
    halting = FORWARD * HALTING if latents and not at_once else 0
    trained = min(settings.get("max_samples", TRAIN_ROWS), TRAIN_ROWS) * (row * (1 + halting) + reading * FORWARD)
    validated = (settings["dev"] or DEV_ROWS) * (row + reading) * FORWARD / settings.get("val_check_interval", 1)
    tokens = settings["num_epochs"] * (trained + validated)
    if latents and (alone := settings.get("reasoner_steps", 0)):  # every question is read once, then nothing more
        read = min(settings.get("max_samples", TRAIN_ROWS), TRAIN_ROWS) + (settings["dev"] or DEV_ROWS)
        tokens += read * QUESTION * FORWARD + alone * ROWS_ALONE * latents * SAYING
    return tokens / TRAINED[0] / 60, tokens / TRAINED[1] / 60


def answering_minutes(settings: dict, *, base: bool = False) -> tuple[float, float]:
    """Of one arm; what is answered at once takes as long as a tenth of a solution. The base writes its steps."""
    problems = settings["compared"] or DEV_ROWS
    share = 1 if base or settings.get("target") != "answer" else AT_ONCE / (ROW - QUESTION)
    return share * problems * ANSWERED[0] / 60, share * problems * ANSWERED[1] / 60


def whole_minutes(settings: dict) -> tuple[float, float]:
    """Both arms trained; base, LoRA, LoRA + TRM and its shuffled control answered; and everything around it."""
    parts = [training_minutes(settings, 0), training_minutes(settings, settings["num_latents"]), AROUND_IT]
    parts += [answering_minutes(settings, base=True)] + 3 * [answering_minutes(settings)]
    return sum(least for least, _ in parts), sum(most for _, most in parts)


def span(least: float, most: float) -> str:
    """Minutes as `4-7 min` or `1.5-2.5 h`."""
    if round(least) == round(most):
        return f"{most:.0f} min"
    return f"{least:.0f}-{most:.0f} min" if most < 100 else f"{least / 60:.1f}-{most / 60:.1f} h"

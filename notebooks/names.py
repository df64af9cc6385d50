"""Is every name of a notebook bound before it is used, and does no run cell replace one of the library's?

Ruff says which names are undefined (F821). A function's body runs later than it is read, so Ruff asks of a name in it
only whether it is bound anywhere. Therefore the notebook is checked up to each run cell: whatever that cell defines or
calls, however indirectly, finds its names by then.

Left out: branches are taken as if all ran, and inside one cell the functions that it calls may use what it binds below.
"""

import ast
import json
import subprocess
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from library import imports_of, python_of
from nbformat.v4 import new_code_cell, new_notebook, writes

RUFF = ("ruff", "check", "--isolated", "--no-cache", "--ignore-noqa", "--target-version=py311", "--select=F821")


@dataclass(frozen=True)
class CodeCell:
    """One code cell, as the checks see it."""

    label: str
    source: str
    live: bool
    """A run cell of the notebook itself; the others hold library code, which only defines."""


def name_problems(cells: list[CodeCell]) -> list[str]:
    """One line for each name that is used before it is bound, never bound, or bound anew by a run cell."""
    return list(dict.fromkeys(undefined_names(cells))) or list(replaced_names(cells))


def undefined_names(cells: list[CodeCell]) -> Iterator[str]:
    """What Ruff finds in the cells up to each run cell, and in all of them; syntax errors too."""
    ends = [end for end, cell in enumerate(cells, start=1) if cell.live or end == len(cells)]
    with TemporaryDirectory() as folder:
        for end in ends:
            code = [new_code_cell(cell.source) for cell in cells[:end]]
            metadata = {"language_info": {"name": "python"}}
            Path(folder, f"{end:04}.ipynb").write_text(writes(new_notebook(cells=code, metadata=metadata)))
        ruff = [sys.executable, "-m", *RUFF, "--output-format=json", folder]
        found = json.loads(subprocess.run(ruff, capture_output=True, text=True).stdout)
    seen: set[tuple[str, str]] = set()
    for one in sorted(found, key=lambda one: one["filename"]):
        cell, end = cells[one["cell"] - 1], cells[int(Path(one["filename"]).stem) - 1]
        _, _, name = one["message"].partition("`")
        if (cell.label, one["message"]) in seen:
            continue
        seen.add((cell.label, one["message"]))
        if one["code"] != "F821":
            yield f"{cell.label}: {one['message']} (line {one['location']['row']} of the cell)"
        elif cell is end:
            yield f"{cell.label}: {name.rstrip('`')} is used before any cell binds it"
        else:
            yield f"{cell.label}: {name.rstrip('`')} is bound by no cell up to {end.label}"


def replaced_names(cells: list[CodeCell]) -> Iterator[str]:
    """Names of the library that a run cell binds to something else, and the other way round."""
    owners: dict[str, CodeCell] = {}
    origins: dict[str, str] = {}
    for cell in cells:
        source = python_of(cell.source)
        imported = {one.binds: one.origin for node in ast.walk(ast.parse(source)) for one in imports_of(node)}
        symbols = symtable.symtable(source, cell.label, "exec").get_symbols()
        for name in [symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()]:
            before = owners.setdefault(name, cell)
            same_import = name in imported and origins.get(name) == imported[name]
            if before is not cell and not (before.live and cell.live) and not same_import:
                yield f"{cell.label}: {name} would replace the {name} of {before.label}; rename it"
        origins.update(imported)

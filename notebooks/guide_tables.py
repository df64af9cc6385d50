"""Cell numbers in the guides, taken from the built notebook, so that they cannot go stale.

In a guide, everything between these markers is written by the build:

    <!-- structure: smollm_trm_colab.ipynb -->
    <!-- /structure -->
    <!-- cells: smollm_trm_colab.ipynb / Configuration --><!-- /cells -->

The first becomes a table of the notebook's sections, the second the cell numbers of the section with that
heading.
"""

import ast
import difflib
import re
from dataclasses import dataclass, field

from library import BuildError, python_of
from nbformat import NotebookNode

HEADING = re.compile(r"(#{1,3}) +(.+)")
STRUCTURE = re.compile(r"(<!-- structure: (\S+) -->\n).*?(<!-- /structure -->)", re.DOTALL)
CELLS = re.compile(r"(<!-- cells: (\S+) / (.+?) -->).*?(<!-- /cells -->)")


@dataclass
class Section:
    """A heading of the notebook and what stands below it."""

    level: int
    heading: str
    first: int
    """Number of its first cell, counted from 1 over all cells, as a reader counts."""
    last: int
    """Number of the last cell before the next heading of this level or above."""
    names: list[str] = field(default_factory=list)
    """Public names that its own code cells define, those of its subsections left out."""

    @property
    def cells(self) -> str:
        """Its cell numbers, as in `7-13`."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def sections_of(notebook: NotebookNode) -> list[Section]:
    """All headings (`#` to `###`, at the start of a markdown cell) of a notebook, in order."""
    sections: list[Section] = []
    for number, cell in enumerate(notebook.cells, start=1):
        heading = HEADING.match(cell.source) if cell.cell_type == "markdown" else None
        if heading:
            sections.append(Section(max(2, len(heading[1])), heading[2].strip(), number, number))
        level = 4
        for section in reversed(sections):
            if section.level < level:
                level, section.last = section.level, number
        if sections and cell.cell_type == "code":
            sections[-1].names = list(dict.fromkeys(sections[-1].names + _public_names(cell)))
    return sections


def structure_table(notebook: NotebookNode) -> str:
    """The notebook's sections as a markdown table: cell numbers, heading, names defined."""
    rows = ["| Cells | Section | Defines |", "| --- | --- | --- |"]
    for section in sections_of(notebook):
        heading = section.heading.replace("|", "\\|")
        title = f"**{heading}**" if section.level == 2 else heading
        rows.append(f"| {section.cells} | {title} | {', '.join(f'`{name}`' for name in section.names)} |")
    return "\n".join(rows)


def filled_guide(text: str, notebooks: dict[str, NotebookNode], place: str) -> str:
    """A guide with everything between its markers written anew.

    Raises:
        BuildError: a marker names a notebook or a heading that does not exist.
    """

    def notebook(name: str) -> NotebookNode:
        if name not in notebooks:
            raise BuildError(f"{place}: a marker names {name}, but only {', '.join(notebooks)} is built")
        return notebooks[name]

    def cells(match: re.Match) -> str:
        sections = sections_of(notebook(match[2]))
        found = [section.cells for section in sections if section.heading == match[3]]
        if len(found) != 1:
            near = difflib.get_close_matches(match[3], [section.heading for section in sections], n=1, cutoff=0)
            raise BuildError(f"{place}: {len(found)} headings of {match[2]} are {match[3]!r}; nearest: {near}")
        return f"{match[1]}{found[0]}{match[4]}"

    text = STRUCTURE.sub(lambda match: f"{match[1]}{structure_table(notebook(match[2]))}\n{match[3]}", text)
    return CELLS.sub(cells, text)


def _public_names(cell: NotebookNode) -> list[str]:
    """Public functions, classes and variables that the cell's top-level statements bind; no imports."""
    names: list[str] = []
    for node in ast.parse(python_of(cell.source)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [part.id for target in targets for part in ast.walk(target) if _is_stored(part)]
    return [name for name in names if not name.startswith("_")]


def _is_stored(part: ast.AST) -> bool:
    return isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)

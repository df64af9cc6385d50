"""Build the self-contained notebooks from their percent sources and the library.

    python notebooks/build.py            write every notebook, and the tables and cell numbers in the guides
    python notebooks/build.py --check    write nothing; exit 1 if a notebook or guide is not what a build
                                         would write, or a library module breaks a rule of inlining

A source is `notebooks/<name>_colab.py` in jupytext's percent format; it becomes `<name>_colab.ipynb` at the
top of the repository. Prose and run cells are taken as they are. Two markers are replaced:

    # %% [imports]      the imports of all inlined modules and those below it
    # %% [library]      all of the library that the run cells reach: a folded section a subpackage, a cell a module
    # data: sentence    (below it) what stands under a section's heading
    # own: Name, Name   (below it) what a run cell defines in the library's place

In the prose, `<!-- contents -->` becomes a linked list of the sections, `<!-- map -->` of the library's parts,
`<!-- badge -->` an "Open in Colab" badge, and `<!-- runs -->` the table of the notebook's `RUNS`. Cell numbers in the
guides stand between markers of their own (`guide_tables.py`), and so does the table of what each run needs in memory
and time (`needs_table.py`).

The same input gives the same bytes: cell ids come from the cells' content, and nothing has been run.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
from guide_tables import HEADING, filled_guide
from inlining import LibraryCell, Namespace, imports_text, library_parts, names_in
from library import (
    PACKAGE,
    BuildError,
    Definition,
    Import,
    imports_of,
    package_modules,
    python_of,
    read_module,
)
from names import CodeCell, name_problems
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from needs_table import filled_needs, runs_table

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("[imports]", "[library]")
RESULTS = "benchmarks/results.jsonl"
LARGEST = 412_000  # bytes
KEPT_METADATA = ("cellView", "tags")
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": [], "toc_visible": True},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Build the notebooks from notebooks/*_colab.py and src/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    check = parser.parse_args(arguments).check
    try:
        problems = package_problems(root) if check else []
        for path, text in built_files(root).items():
            place = path.relative_to(root).as_posix()
            if path.is_file() and path.read_text(encoding="utf-8") == text:
                continue
            if check:
                problems.append(f"{place} is not what a build would write; run 'make notebook' and commit it")
            else:
                _write(path, text)
                print(f"wrote {place} ({len(text.encode()) / 1000:.0f} kB)")
    except BuildError as error:
        problems = [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def built_files(root: Path = ROOT) -> dict[Path, str]:
    """Every file that a build writes, with its text: the notebooks, and the guides."""
    notebooks = {f"{source.stem}.ipynb": build_notebook(source, root) for source in notebook_sources(root)}
    files = {root / name: notebook_text(notebook) for name, notebook in notebooks.items()}
    for path, text in files.items():
        if (size := len(text.encode())) > LARGEST:
            raise BuildError(f"{path.name} has {size} bytes, more than {LARGEST}; inline less")
    for guide in sorted(root.glob("*.md")):
        text = filled_guide(guide.read_text(encoding="utf-8"), notebooks, guide.name)
        cells = {name: notebook.cells for name, notebook in notebooks.items()}
        files[guide] = filled_needs(text, cells, root / RESULTS)
    return files


def notebook_text(notebook: NotebookNode) -> str:
    """A notebook as its file's text: one cell a line, its source one string, a quarter shorter than nbformat's own."""

    def packed(value: object) -> str:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))

    cells = ",\n".join(packed(cell) for cell in notebook.cells)
    rest = packed({name: value for name, value in notebook.items() if name != "cells"})
    return f'{{"cells":[\n{cells}\n],{rest[1:]}\n'


def notebook_sources(root: Path = ROOT) -> list[Path]:
    """The percent sources, sorted."""
    return sorted((root / "notebooks").glob("*_colab.py"))


def build_notebook(source: Path, root: Path = ROOT) -> NotebookNode:
    """One notebook from its percent source.

    Raises:
        BuildError: a marker is malformed, a module cannot be inlined, a run cell imports the library, or a
            name is used before it is bound.
    """
    place, names = source.name, Namespace()
    read = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent").cells
    marked = {cell.metadata.get("title", ""): cell for cell in read if cell.cell_type == "code"}
    for marker in MARKERS:
        if [cell.metadata.get("title", "") for cell in read].count(marker) != 1:
            raise BuildError(f"{place}: exactly one '# %% {marker}' is needed")
    for marker in marked:
        if marker.startswith("[") and marker not in MARKERS:
            raise BuildError(f"{place}: '# %% {marker}' is no marker; write one of {', '.join(MARKERS)}")
    for one in _extra_imports(marked["[imports]"].source, place):
        names.collect(one, place)
    live = [cell for cell in read if cell.cell_type == "code" and not cell.metadata.get("title", "").startswith("[")]
    own = re.search(r"^# own: (.+)$", marked["[library]"].source, re.MULTILINE)
    own = set(own[1].split(", ") if own else ())
    parts = library_parts(root, set().union(*(names_in(python_of(cell.source)) for cell in live)), names, own)
    cells: list[NotebookNode] = []
    kinds, folded = {}, []
    for cell in read:
        marker = cell.metadata.get("title", "")
        if cell.cell_type != "code":
            cells.append(new_markdown_cell(cell.source))
        elif marker == "[imports]":
            imports = imports_text(one for one, _ in names.imports.values())
            cells.append(_library_cell(f"#@title Imports\n{imports}"))
            kinds[len(cells)] = "the imports cell"
        elif marker == "[library]":
            for name, modules in parts.items():
                cells.append(new_markdown_cell(_part_heading(name, cell.source)))
                folded.append(cells[-1])
                for module in modules:
                    cells.append(_library_cell(module.source))
                    kinds[len(cells)] = module.path
        else:
            metadata = {key: cell.metadata[key] for key in KEPT_METADATA if key in cell.metadata}
            cells.append(new_code_cell(cell.source, metadata=metadata))
    _refuse_bad_names(cells, kinds, place)
    _fill_prose(cells, parts, root, f"{source.stem}.ipynb")
    return _finished(cells, folded)


def _part_heading(name: str, sentences: str) -> str:
    """The heading of a part of the library, with the sentence that the source has for it."""
    said = re.search(rf"^# {name}: (.+)$", sentences, re.MULTILINE)
    return f"### The library: {name}" + (f"\n\n{said[1]}" if said else "")


def _fill_prose(cells: list[NotebookNode], parts: dict[str, list[LibraryCell]], root: Path, name: str) -> None:
    """Give every section an anchor, and write what the prose's markers stand for."""
    prose = [cell for cell in cells if cell.cell_type == "markdown"]
    headings = {cell.source: HEADING.match(cell.source) for cell in prose}
    sections = [found[2].strip() for found in headings.values() if found and len(found[1]) == 2]
    contents = " · ".join(f"[{heading}](#{_anchor(heading)})" for heading in sections)
    parts_map = "\n".join(
        f"- [{part}](#{_anchor(f'The library: {part}')}): {', '.join(f'`{one.path}`' for one in modules)}"
        for part, modules in parts.items()
    )
    for cell in prose:
        if headings[cell.source]:
            first, _, rest = cell.source.partition("\n")
            cell.source = f'{first}\n<a name="{_anchor(headings[cell.source][2])}"></a>\n{rest}'.rstrip("\n")
        cell.source = filled_needs(cell.source, {None: cells}, root / RESULTS)
        for marker, text in (("contents", contents), ("map", parts_map), ("badge", _badge(root, name))):
            cell.source = cell.source.replace(f"<!-- {marker} -->", text)
        if "<!-- runs -->" in cell.source:
            cell.source = cell.source.replace("<!-- runs -->", runs_table(cells))


def _anchor(heading: str) -> str:
    return "-".join(re.findall(r"\w+", heading.lower()))


def _badge(root: Path, name: str) -> str:
    """A badge that opens the notebook in Colab, from the repository that pyproject.toml names, else Colab's start."""
    path = root / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}) if path.is_file() else {}
    repository = project.get("urls", {}).get("Repository", "").removeprefix("https://github.com/").rstrip("/")
    target = f"github/{repository}/blob/main/{name}" if repository else ""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})](https://colab.research.google.com/{target})"


def package_problems(root: Path = ROOT) -> list[str]:
    """One line for everything in the library that a notebook could not inline."""
    modules = {name: read_module(root, name) for name in package_modules(root)}
    problems = [problem for module in modules.values() for problem in module.problems]
    bound = [(module, one) for module in modules.values() for one in module.definitions]
    bound += [(module, one) for module in modules.values() for one in module.imports]
    names = Namespace()
    for module, one in bound:
        place = f"{module.place}:{one.line}"
        try:
            if isinstance(one, Definition):
                names.define(one, place)
            elif not one.own:
                names.collect(one, place)
            elif one.module not in modules or one.name not in modules[one.module].names:
                raise BuildError(f"{place}: {one.module} defines no {one.name}; import it from where it is defined")
        except BuildError as error:
            problems.append(str(error))
    return problems


def _extra_imports(body: str, place: str) -> list[Import]:
    """The imports that a notebook's source adds to the imports cell for its own run cells."""
    statements = ast.parse(body).body
    if not all(imports_of(node) for node in statements):
        raise BuildError(f"{place}: only imports may stand below '# %% [imports]'")
    return [one for node in statements for one in imports_of(node)]


def _library_cell(source: str) -> NotebookNode:
    """A folded code cell: by `cellView` in Colab, by `source_hidden` in JupyterLab."""
    metadata = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["library"]}
    return new_code_cell(source, metadata=metadata)


def _refuse_bad_names(cells: list[NotebookNode], kinds: dict[int, str], place: str) -> None:
    """Refuse imports of the library, and names that are used before they are bound."""
    checked: list[CodeCell] = []
    for number, cell in enumerate(cells, start=1):
        if cell.cell_type == "code":
            label = f"cell {number} ({kinds.get(number) or _first_line(cell.source)})"
            checked.append(CodeCell(label, cell.source, live=number not in kinds))
    problems = name_problems(checked)
    for cell in checked:
        if re.search(rf"^\s*(from|import) {PACKAGE}\b", python_of(cell.source), re.MULTILINE):
            problems.insert(0, f"{cell.label}: imports {PACKAGE}; inline it instead")
    if problems:
        raise BuildError(f"{place}: " + f"\n{place}: ".join(problems))


def _first_line(source: str) -> str:
    return source.lstrip().partition("\n")[0][:50]


def _finished(cells: list[NotebookNode], folded: list[NotebookNode]) -> NotebookNode:
    """A valid notebook whose cell ids follow from the cells' content; sections to be folded begin with these cells."""
    seen: Counter[str] = Counter()
    for cell in cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] += 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    for cell in folded:  # by its id in Colab, by a flag in JupyterLab
        cell.metadata |= {"id": cell.id, "jp-MarkdownHeadingCollapsed": True}
    colab = {**METADATA["colab"], "collapsed_sections": [cell.id for cell in folded]}
    notebook = new_notebook(cells=cells, metadata={**METADATA, "colab": colab})
    notebook.nbformat_minor = 5
    nbformat.validate(notebook)
    return notebook


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

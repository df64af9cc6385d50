"""Library modules as notebook cells: a module's docstring becomes prose, its definitions become code cells.

A definition gets a cell of its own; small neighbours (constants, helpers, dataclasses) that read as one share
a cell, and constants go with what follows them. All imports are collected for the one imports cell.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from library import BuildError, Definition, Import, LibraryModule, read_module

SMALL = 40  # lines up to which a definition may share a cell
SHARED = 100  # lines up to which a shared cell may grow
WIDE = 110  # characters up to which an import stays on one line
LIST_ITEM = re.compile(r"\s*([-*+]|\d+[.)])\s")


@dataclass(frozen=True)
class LibraryCell:
    """A cell made from library text."""

    source: str
    is_code: bool


@dataclass
class Namespace:
    """The one namespace that all inlined modules share: every name means one thing."""

    places: dict[str, str] = field(default_factory=dict)
    """Name -> where it was defined."""
    statements: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Names -> the code that binds them."""
    imports: dict[str, tuple[Import, str]] = field(default_factory=dict)
    """Name -> the import that binds it, and where it stood."""

    def define(self, definition: Definition, place: str) -> bool:
        """Bind a definition's names; False if another module brought this very constant already (`logger = ...`).

        Raises:
            BuildError: a name is something else already.
        """
        if definition.kind == "constant" and self.statements.get(definition.names) == definition.code:
            return False
        self.statements[definition.names] = definition.code
        for name in definition.names:
            if before := self.places.get(name) or self.imports.get(name, ("", ""))[1]:
                raise BuildError(f"{place}: {name} clashes with {name} in {before}; rename one")
            self.places[name] = place
        return True

    def collect(self, wanted: Import, place: str) -> None:
        """Put an import into the imports cell.

        Raises:
            BuildError: its name is something else already.
        """
        name = wanted.binds
        if name in self.places:
            raise BuildError(f"{place}: the import of {name} clashes with {name} in {self.places[name]}; rename one")
        known, where = self.imports.setdefault(name, (wanted, place))
        if known.origin != wanted.origin:
            raise BuildError(f"{place}: {name} is {wanted.origin} here and {known.origin} in {where}; rename one")


@dataclass
class Inlining:
    """What one notebook has taken from the library so far."""

    root: Path
    inlined: dict[str, set[str]] = field(default_factory=dict)
    """Module name -> the names that stand in the notebook."""
    names: Namespace = field(default_factory=Namespace)

    def add(self, name: str, only: tuple[str, ...] = ()) -> list[LibraryCell]:
        """The cells of one module.

        Args:
            name: the module's dotted name.
            only: the top-level names to take, without the prose; empty for all that are not there yet.

        Raises:
            BuildError: the module breaks a rule of inlining, has no such name, clashes with what is in the
                notebook already, or needs an own module that is not there yet.
        """
        module = read_module(self.root, name)
        if module.problems:
            raise BuildError("\n".join(module.problems))
        if unknown := sorted(set(only) - set(module.names)):
            raise BuildError(f"{module.place} defines no {', '.join(unknown)}; correct its [inline] marker")
        there = self.inlined.setdefault(name, set())
        wanted = set(only) or set(module.names) - there
        taken = [one for one in module.definitions if set(one.names) & wanted]
        text = "\n".join(one.text for one in taken)
        for one in module.imports:
            if only and not re.search(rf"\b{one.binds}\b", text):
                continue
            place = f"{module.place}:{one.line}"
            if not one.own:
                self.names.collect(one, place)
            elif one.name not in self.inlined.get(one.module, ()):
                raise BuildError(
                    f"{place} needs {one.name}, which is not in the notebook yet: "
                    f"put '# %% [inline] {one.module}' above that of {module.name}"
                )
        there.update(bound for one in taken for bound in one.names)
        new = [one for one in taken if self.names.define(one, f"{module.place}:{one.line}")]
        prose = [] if only else [LibraryCell(prose_of(module), is_code=False)]
        return prose + [LibraryCell(code_of(group, module), is_code=True) for group in grouped(new)]


def grouped(definitions: Iterable[Definition]) -> list[list[Definition]]:
    """Definitions by cell, in their order."""
    cells: list[list[Definition]] = []
    for definition in definitions:
        group = cells[-1] if cells else []
        shared = [*group, definition]
        small = all(one.height <= SMALL for one in shared) and sum(one.height for one in shared) <= SHARED
        alike = all(one.kind == definition.kind for one in group)
        if group and ((small and alike) or all(one.kind == "constant" for one in group)):
            group.append(definition)
        else:
            cells.append([definition])
    return cells


def code_of(group: list[Definition], module: LibraryModule) -> str:
    """The text of a library cell: a title, shown by Colab in place of folded code, and the source."""
    speaking = [one for one in group if one.kind != "constant"] or group
    names = [name for one in speaking for name in one.names]
    shown = ([name for name in names if not name.startswith("_")] or names)[:4]
    text = "".join(f"{one.text}\n" for one in group).strip("\n")
    return f"#@title {', '.join(shown)} · {module.place.removeprefix('src/')}\n{text}"


def prose_of(module: LibraryModule) -> str:
    """The markdown above a module's cells: its docstring, the first line as heading."""
    title, _, body = module.docstring.partition("\n")
    if body.split("\n")[0].strip():  # the first line is not a summary of its own
        title, body = module.name.rpartition(".")[2].replace("_", " ").capitalize(), module.docstring
    parts = (
        f"### {_markdown(title.rstrip('.'))}",
        _markdown(body.strip("\n")),
        f"*Source: `{module.place}`*",
    )
    return "\n\n".join(part for part in parts if part)


def _markdown(docstring: str) -> str:
    """A docstring so that markdown shows what it says: `<think>`, `$18` and `#### 72` are text there.

    Indented blocks stay as they are (markdown shows them as code), and get the blank line they need above.
    """
    lines: list[str] = []
    for line in docstring.split("\n"):
        above = lines[-1] if lines else ""
        if line.startswith("    ") and above.rstrip().endswith(":") and not LIST_ITEM.match(above):
            lines.append("")
        code = line.startswith("    ") and not any(LIST_ITEM.match(before) for before in lines[-3:])
        lines.append(line if code else _escaped(line))
    return "\n".join(lines)


def _escaped(line: str) -> str:
    """One line of prose, with what markdown would take for itself escaped outside of `code`."""
    parts = re.split(r"(`+[^`]*`+)", line)
    parts[::2] = [re.sub(r"\$", r"\\$", part.replace("<", "&lt;")) for part in parts[::2]]
    return re.sub(r"^(\s*)#", r"\1\\#", "".join(parts))


def imports_text(imports: Iterable[Import]) -> str:
    """The imports cell: the standard library, then the others, each sorted, one statement a module."""
    plain: dict[str, set[str]] = {}
    named: dict[str, set[str]] = {}
    for one in imports:
        spelled = one.name if one.alias in (None, one.name) else f"{one.name} as {one.alias}"
        (named if one.module else plain).setdefault(one.module or spelled, set()).add(spelled)
    blocks: list[str] = []
    for standard in (True, False):
        plain_here = [f"import {name}" for name in sorted(plain) if _is_standard(name) is standard]
        named_here = [_from_import(name, named[name]) for name in sorted(named) if _is_standard(name) is standard]
        blocks += ["\n".join(plain_here + named_here)]
    return "\n\n".join(block for block in blocks if block)


def _is_standard(module: str) -> bool:
    return re.split(r"[. ]", module)[0] in sys.stdlib_module_names


def _from_import(module: str, names: set[str]) -> str:
    ordered = sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    line = f"from {module} import {', '.join(ordered)}"
    if len(line) <= WIDE:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")"

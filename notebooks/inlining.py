"""The library as notebook cells: what a notebook calls, and all that this calls in turn, one cell a module.

The parts are the library's subpackages, the modules in them stand in the order of their imports, and what nothing in
the notebook reaches stays out. Definitions are taken as they are written, but of a docstring only its first paragraph:
the rest is at home in the source. All imports are collected for the one imports cell.
"""

import ast
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

from library import PACKAGE, BuildError, Definition, Import, LibraryModule, package_modules, read_module

WIDE = 110  # characters up to which an import stays on one line
GROUND, WHOLE = "ground", "all of it in one call"


@dataclass(frozen=True)
class LibraryCell:
    """What a notebook takes of one module."""

    module: LibraryModule
    taken: tuple[Definition, ...]

    @property
    def path(self) -> str:
        """As the title shows it: `models/blocks.py`."""
        return self.module.place.removeprefix(f"src/{PACKAGE}/")

    @property
    def source(self) -> str:
        """A title, shown by Colab in place of folded code, and the definitions."""
        text = "".join(f"{first_paragraphs(one.text)}\n" for one in self.taken).strip("\n")
        title = self.module.docstring.partition("\n\n")[0].replace("\n", " ").rstrip(".")
        return f"#@title {self.path} · {title}\n{text}"


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


def names_in(source: str) -> set[str]:
    """Every name that some code mentions; none where it is no Python, which is refused elsewhere, by its place."""
    try:
        return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    except SyntaxError:
        return set()


def library_parts(root: Path, wanted: set[str], names: Namespace, own: set[str]) -> dict[str, list[LibraryCell]]:
    """The cells of everything that these names reach, but for the notebook's `own`; their imports go into `names`.

    Raises:
        BuildError: a module breaks a rule of inlining, or a name means two things.
    """
    modules = in_reading_order({name: read_module(root, name) for name in package_modules(root)})
    reached = reached_definitions(modules, wanted, own)
    parts: dict[str, list[LibraryCell]] = {}
    for name, module in modules.items():
        taken = [one for one in module.definitions if one in reached[name]]
        if not taken:
            continue
        if module.problems:
            raise BuildError("\n".join(module.problems))
        text = "\n".join(one.text for one in taken)
        for one in module.imports:
            if not one.own and re.search(rf"\b{one.binds}\b", text):
                names.collect(one, f"{module.place}:{one.line}")
        new = tuple(one for one in taken if names.define(one, f"{module.place}:{one.line}"))
        if new:
            parts.setdefault(part_of(module), []).append(LibraryCell(module, new))
    return parts


def part_of(module: LibraryModule) -> str:
    """The subpackage of a module; beside them stands what all of them stand on, and what stands on all of them."""
    if module.name.count(".") > 1:
        return module.name.split(".")[1]
    return WHOLE if any(one.own and (one.module or "").count(".") > 1 for one in module.imports) else GROUND


def in_reading_order(modules: dict[str, LibraryModule]) -> dict[str, LibraryModule]:
    """Modules behind all that they import, those of a subpackage together.

    Raises:
        BuildError: two modules import each other.
    """
    own = {name: {one.module for one in module.imports if one.own} & modules.keys() for name, module in modules.items()}
    try:
        rooms: dict[str, set[str]] = {}
        for name, imported in own.items():
            room = name.split(".")[1]
            rooms.setdefault(room, set()).update({one.split(".")[1] for one in imported} - {room})
        room_rank = {room: rank for rank, room in enumerate(sorted_by_need(rooms))}
        module_rank = {name: rank for rank, name in enumerate(sorted_by_need(own))}
    except ValueError as error:
        raise BuildError(f"modules that import each other cannot be put in an order: {error.args[1]}") from None

    def place(name: str) -> tuple[int, int, int]:
        part = part_of(modules[name])
        return (part == WHOLE) - (part == GROUND), room_rank[name.split(".")[1]], module_rank[name]

    return {name: modules[name] for name in sorted(modules, key=place)}


def sorted_by_need(needs: dict[str, set[str]]) -> list[str]:
    """Every key behind what it needs, otherwise by the alphabet."""
    sorter, ordered = TopologicalSorter(needs), []
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        ordered += ready
        sorter.done(*ready)
    return ordered


def reached_definitions(
    modules: dict[str, LibraryModule], wanted: set[str], own: set[str]
) -> dict[str, list[Definition]]:
    """Module -> the definitions that these names mention, directly or through others, but for a notebook's `own`."""
    owners: dict[str, list[tuple[str, Definition]]] = {}
    for module in modules.values():
        for one in module.definitions:
            for name in {*one.names} - own:  # two owners are refused later, by name
                owners.setdefault(name, []).append((module.name, one))
    reached: dict[str, list[Definition]] = {name: [] for name in modules}
    new = wanted & owners.keys()
    while new:
        mentioned: set[str] = set()
        for module, one in (owner for name in sorted(new) for owner in owners[name]):
            if one not in reached[module]:
                reached[module].append(one)
                mentioned |= names_in(one.text)
        done = {name for found in reached.values() for one in found for name in one.names}
        new = (mentioned & owners.keys()) - done
    return reached


def first_paragraphs(text: str) -> str:
    """Some code with every docstring cut to its first paragraph."""
    lines, cut = text.split("\n"), {}
    for node in ast.walk(ast.parse(text)):
        for one in getattr(node, "body", None) if isinstance(getattr(node, "body", None), list) else ():
            is_text = isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
            if is_text and isinstance(one.value.value, str) and one.end_lineno > one.lineno:
                cut[one.lineno - 1] = one.end_lineno
    for start, end in sorted(cut.items(), reverse=True):
        blank = next((at for at in range(start, end) if not lines[at].strip()), None)
        closing = lines[end - 1].strip()
        last = blank if blank is not None else end - 1 if closing == '"""' else None
        if last is not None:
            lines[start:end] = [*lines[start : last - 1], lines[last - 1] + '"""']
    return "\n".join(lines)


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

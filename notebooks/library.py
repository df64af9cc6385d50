"""Library modules taken apart: definitions as they are written, imports, and whatever forbids inlining.

A notebook has one namespace and no files, so a module can be inlined only if it keeps to a few rules: own
imports are `from smollm_trm.x.y import Name` at the top of the file, top-level names differ throughout the
package, and importing does nothing but define. `read_module` reports every breach as one line with its place.

The text is cut by the line numbers of the syntax tree, never written anew, so comments, decorators and
formatting survive. A comment belongs to the statement below it; that of an import is dropped with the import.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "smollm_trm"
NEVER_INLINED = frozenset({"__init__", "__main__", "cli", "commands"})  # entry points; a notebook has its own
HIDDEN_PLACES = ("__file__", "__all__", "__path__", "__spec__")  # mean something in a file only
MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)
KINDS = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}


class BuildError(ValueError):
    """A notebook that cannot be built; each line of the message says what, where, and what to do."""


@dataclass(frozen=True)
class Import:
    """One name that an import binds."""

    module: str | None
    """The x of `from x import name`; None for `import name`."""
    name: str
    alias: str | None
    line: int

    @property
    def binds(self) -> str:
        """The name by which the code knows it."""
        return self.alias or (self.name if self.module else self.name.partition(".")[0])

    @property
    def origin(self) -> str:
        """What it stands for; two imports of one origin under one name are the same import."""
        if self.module:
            return f"{self.module}.{self.name}"
        return self.name if self.alias else self.binds

    @property
    def own(self) -> bool:
        """Whether it comes from the library itself."""
        return (self.module or self.name).partition(".")[0] == PACKAGE


@dataclass(frozen=True)
class Definition:
    """One top-level statement with the comments above it."""

    names: tuple[str, ...]
    text: str
    """Its lines as written, from the end of the statement before it; begins with the blank lines between."""
    line: int
    kind: str
    """`constant`, `function` or `class`."""

    @property
    def code(self) -> str:
        """The statement without comments and formatting."""
        return ast.unparse(ast.parse(self.text))

    @property
    def height(self) -> int:
        """Number of lines without the blank ones above."""
        return self.text.strip("\n").count("\n") + 1


@dataclass(frozen=True)
class LibraryModule:
    """A module of the library, ready to be inlined if it has no problems."""

    name: str
    """Dotted, as in `smollm_trm.models.blocks`."""
    place: str
    """Path from the repository's root, for messages."""
    docstring: str
    definitions: tuple[Definition, ...]
    imports: tuple[Import, ...]
    problems: tuple[str, ...]

    @property
    def names(self) -> dict[str, int]:
        """Every top-level name and its line."""
        return {name: definition.line for definition in self.definitions for name in definition.names}


def python_of(source: str) -> str:
    """A cell's source with `%magic` and `!shell` lines made harmless."""
    return MAGIC.sub(r"\1pass", source)


def imports_of(node: ast.stmt) -> list[Import]:
    """The names that an import statement binds; empty for any other statement."""
    if isinstance(node, ast.Import):
        return [Import(None, alias.name, alias.asname, node.lineno) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [Import(module, alias.name, alias.asname, node.lineno) for alias in node.names]
    return []


def package_modules(root: Path) -> list[str]:
    """Dotted names of all modules under `root/src/smollm_trm` that a notebook may inline, sorted."""
    src = root / "src"
    files = sorted((src / PACKAGE).rglob("*.py"))
    return [".".join(file.relative_to(src).with_suffix("").parts) for file in files if file.stem not in NEVER_INLINED]


def read_module(root: Path, name: str) -> LibraryModule:
    """Take one module apart.

    Args:
        root: the repository, with `src/` in it.
        name: the module's dotted name.

    Raises:
        BuildError: there is no such module, or it does not parse.
    """
    path = root.joinpath("src", *name.split(".")).with_suffix(".py")
    place = path.relative_to(root).as_posix()
    if not path.is_file():
        raise BuildError(f"{place}: no such module; no notebook can inline it")
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise BuildError(f"{place}:{error.lineno}: {error.msg}") from None
    definitions, problems = _cut(source, tree)
    docstring = ast.get_docstring(tree) or ""
    for line, text in [(1, docstring), *((one.line, one.text) for one in definitions)]:
        if re.search(rf"\b(from|import) {PACKAGE}\b", text):
            problems.append((line, f"this text imports {PACKAGE}, which a notebook cannot; reword or move it"))
    return LibraryModule(
        name=name,
        place=place,
        docstring=docstring,
        definitions=tuple(definitions),
        imports=tuple(bound for node in tree.body for bound in imports_of(node)),
        problems=tuple(f"{place}:{line}: {what}" for line, what in sorted(problems + _forbidden(tree))),
    )


def _cut(source: str, tree: ast.Module) -> tuple[list[Definition], list[tuple[int, str]]]:
    """The text, cut at the ends of its statements, and (line, what) of those a notebook cannot take."""
    lines = source.split("\n")
    definitions: list[Definition] = []
    problems: list[tuple[int, str]] = []
    end = 0
    for position, node in enumerate(tree.body):
        start, end = end, node.end_lineno
        text = "\n".join(lines[start:end])
        if node.lineno <= start:
            problems.append((node.lineno, "two statements on one line; give each its own"))
        elif (position == 0 and _is_text(node)) or imports_of(node):
            continue
        elif _is_text(node) and definitions:  # the docstring of a constant
            above = definitions.pop()
            definitions.append(Definition(above.names, f"{above.text}\n{text}", above.line, above.kind))
        elif names := _defined_names(node):
            kind = KINDS.get(type(node), "constant")
            definitions.append(Definition(names, text, node.lineno, kind))
        else:
            problems.append((node.lineno, "a module to be inlined only imports and defines; move this into a function"))
    rest = "\n".join(lines[end:]).rstrip()
    if rest and definitions:  # comments below the last statement
        last = definitions.pop()
        definitions.append(Definition(last.names, f"{last.text}\n{rest}", last.line, last.kind))
    return definitions, problems


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _defined_names(node: ast.stmt) -> tuple[str, ...]:
    """The names that a definition or a plain assignment binds; empty for any other statement."""
    if type(node) in KINDS:
        return (node.name,)
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    parts = [part for target in targets for part in ast.walk(target)]
    plain = ast.Name | ast.Tuple | ast.List | ast.Starred | ast.expr_context
    if not isinstance(node, ast.Assign | ast.AnnAssign) or not all(isinstance(part, plain) for part in parts):
        return ()
    return tuple(part.id for part in parts if isinstance(part, ast.Name))


def _forbidden(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, what) of everything that does not survive outside the module's file."""
    found = []
    if not ast.get_docstring(tree):
        found.append((1, "no module docstring; it becomes the prose above the cells"))
    seen: dict[str, int] = {}
    for node in tree.body:
        for name in _defined_names(node):
            if name in seen:
                found.append((node.lineno, f"{name} is defined in line {seen[name]} already; rename one"))
            seen[name] = node.lineno
    for node in ast.walk(tree):
        for bound in imports_of(node):
            if bound.module == "__future__" or (bound.module or "").startswith(".") or bound.name == "*":
                found.append((bound.line, f"write an absolute import by name instead of {ast.unparse(node)}"))
            elif bound.own and (bound.module in (None, PACKAGE) or bound.alias or node not in tree.body):
                found.append((bound.line, f"import own names at the top as 'from {PACKAGE}.x.y import Name'"))
        if isinstance(node, ast.Name) and node.id in HIDDEN_PLACES:
            found.append((node.lineno, f"{node.id} has no meaning in a notebook"))
    return found

"""Is every name of a notebook bound before it is used?

The compiler knows the scope of every name, so its bytecode is read, without running anything. A statement's
own code runs when its cell does; so do class bodies, decorators, defaults, annotations and comprehensions:
what they load must be bound by then. The body of a function runs later: what it loads must be bound when the
notebook has run, and, when a run cell mentions the function, by that cell, through all that it calls in turn.

Left out: branches are taken as if all ran, so a name bound in one branch only counts as bound.
"""

import ast
import builtins
import dis
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType

from library import imports_of

ALWAYS_THERE = frozenset(dir(builtins)) | {"__name__", "__doc__", "get_ipython", "display"}
COMPILERS_OWN = (
    "__annotations__",
    "__annotate__",
    "__conditional_annotations__",
)  # each statement has its own
RUNS_IN_PLACE = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<generic parameters of")
MAGIC = re.compile(r"^(\s*)[%!].*$", re.MULTILINE)


@dataclass(frozen=True)
class CodeCell:
    """One code cell, as the checker sees it."""

    label: str
    source: str
    live: bool
    """A run cell of the notebook itself; the others hold library code, which only defines."""


@dataclass(frozen=True)
class Use:
    """One moment at which a statement touches a global name."""

    name: str
    kind: str
    """`load`, `store` or `delete`."""
    at_once: bool
    """While the statement runs; otherwise when a function it defines is called."""


def name_problems(cells: list[CodeCell]) -> list[str]:
    """One line for each name that is used before it is bound, never bound, or bound anew by a run cell."""
    names, problems, deferred = _Names(), [], {}
    for cell in cells:
        try:
            statements = ast.parse(python_of(cell.source)).body
        except SyntaxError as error:
            problems.append(f"{cell.label}: {error.msg} (line {error.lineno} of the cell)")
            continue
        for statement in statements:
            uses = list(_uses(compile(ast.Module([statement], []), cell.label, "exec"), at_once=True))
            problems += names.run(statement, uses, cell)
            deferred.update({use.name: cell for use in uses if use.kind == "load" and not use.at_once})
    problems += [
        f"{cell.label}: the code of a function uses {name}, which no cell binds"
        for name, cell in deferred.items()
        if name not in names.owner and name not in ALWAYS_THERE
    ]
    return list(dict.fromkeys(problems))


def python_of(source: str) -> str:
    """A cell's source with `%magic` and `!shell` lines made harmless."""
    return MAGIC.sub(r"\1pass", source)


@dataclass
class _Names:
    """The notebook's names while its statements pass by."""

    owner: dict[str, CodeCell] = field(default_factory=dict)
    """Name -> the cell that bound it last."""
    needs: dict[str, set[str]] = field(default_factory=dict)
    """Name -> the names that the statement which bound it loads, at once or later."""
    origins: dict[str, str] = field(default_factory=dict)
    """Name -> what it was imported from."""

    def run(self, statement: ast.stmt, uses: list[Use], cell: CodeCell) -> list[str]:
        """Bind what a statement binds; returns what it finds unbound or binds anew."""
        imported = {one.binds: one.origin for node in ast.walk(statement) for one in imports_of(node)}
        stored = {use.name for use in uses if use.kind == "store" and use.at_once}
        loaded = {use.name for use in uses if use.kind == "load"}
        problems: list[str] = []
        for use in (use for use in uses if use.at_once):
            if use.kind == "load":
                problems += self._load(use.name, cell)
            elif use.kind == "delete":
                self.owner.pop(use.name, None)
            else:
                problems += self._store(use.name, cell, imported.get(use.name))
                self.needs[use.name] = loaded - stored
        return problems

    def _load(self, name: str, cell: CodeCell) -> list[str]:
        if name not in self.owner and name not in ALWAYS_THERE:
            return [f"{cell.label}: {name} is used before any cell above binds it"]
        if cell.live and (missing := self._missing_behind(name)):
            return [f"{cell.label}: {name} needs {', '.join(sorted(missing))}, which no cell above binds"]
        return []

    def _store(self, name: str, cell: CodeCell, origin: str | None) -> list[str]:
        before = self.owner.get(name)
        imported_again = origin is not None and origin == self.origins.get(name)
        self.owner[name] = cell
        if origin is not None:
            self.origins[name] = origin
        if before is None or imported_again or (before.live and cell.live):
            return []
        return [f"{cell.label}: {name} would replace the {name} of {before.label}; rename it"]

    def _missing_behind(self, name: str) -> set[str]:
        """Names that the code behind `name` may load, however indirectly, and that nothing has bound yet."""
        reached, frontier = set(), [name]
        while frontier:
            current = frontier.pop()
            if current not in reached and current not in ALWAYS_THERE:
                reached.add(current)
                frontier += self.needs.get(current, ())
        return reached - set(self.owner)


def _uses(code: CodeType, *, at_once: bool) -> Iterator[Use]:
    """Uses of global names by a piece of code, in the order of its instructions."""
    own_scope = set()  # what a class body has bound for itself
    in_class = not code.co_flags & inspect.CO_OPTIMIZED and code.co_name != "<module>"
    for instruction in dis.get_instructions(code):
        action, _, scope = instruction.opname.partition("_")
        inner = instruction.argval
        if isinstance(inner, CodeType):
            in_place = not inner.co_flags & inspect.CO_OPTIMIZED or inner.co_name.startswith(RUNS_IN_PLACE)
            yield from _uses(inner, at_once=at_once and in_place)
        elif inner in COMPILERS_OWN:
            continue
        elif scope in ("NAME", "GLOBAL") and action in ("LOAD", "STORE", "DELETE"):
            if in_class and scope == "NAME" and (action != "LOAD" or inner in own_scope):
                own_scope.add(inner)
            else:
                yield Use(inner, action.lower(), at_once)

"""The rooms of the house: which package may know which, and that no arrow comes back."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "smollm_trm"
MAY_KNOW = {
    "data": {"records"},
    "models": {"records", "data"},
    "training": {"records", "bars", "data", "models"},
    "evaluation": {"records", "bars", "data", "models"},
    "arithmetic": {"records", "bars", "data", "models", "training", "evaluation"},
    "phases": {"records", "bars", "data", "models", "training", "evaluation"},
    "finetune": {"records", "bars", "data", "models", "training", "evaluation"},
    "grpo": {"records", "bars", "data", "models", "training", "evaluation", "finetune"},
}


def room_of(module: str) -> str:
    """`smollm_trm.models.smollm` stands in the room `models`."""
    return module.split(".")[1]


def imports_by_module() -> dict[str, set[str]]:
    """Every own module that a module imports, wherever in it."""
    found = {}
    for path in SRC.rglob("*.py"):
        name = ".".join(("smollm_trm", *path.relative_to(SRC).with_suffix("").parts))
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        named = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        found[name] = {module for module in named if module.startswith("smollm_trm.")}
    return found


def test_a_room_knows_only_the_rooms_below_it():
    for module, imported in imports_by_module().items():
        room = room_of(module) if module.count(".") else module
        if room in MAY_KNOW:
            foreign = {room_of(one) for one in imported} - MAY_KNOW[room] - {room}
            assert not foreign, f"{module} imports from {sorted(foreign)}"


def test_no_module_imports_itself_by_way_of_others():
    list(TopologicalSorter(imports_by_module()).static_order())


def test_nothing_outside_the_reasoners_knows_one_of_them_by_name():
    names = ("HiddenStateTRM", "CompressedReader", "StaticLatents", "PauseTokens", "Coconut(", "PredictedState")
    for path in SRC.rglob("*.py"):
        if path.parent.name != "reasoners" and path != SRC / "__init__.py":
            text = path.read_text(encoding="utf-8")
            assert not [name for name in names if name in text], path


def test_the_readme_is_finished():
    assert "<!--" not in (SRC.parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_library_stays_small():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SRC.rglob("*.py"))
    assert lines <= 12450, f"{lines} lines: what can go?"  # 9,000 is the aim

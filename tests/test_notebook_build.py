"""The notebooks are the library: the builder's promises on small packages, and the proof on the real one."""

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import build  # noqa: E402
from guide_tables import sections_of, structure_table  # noqa: E402
from library import BuildError, imports_of, python_of  # noqa: E402
from names import CodeCell, name_problems  # noqa: E402
from needs_table import answering_minutes, training_minutes  # noqa: E402

SHAPES = '''"""Shapes and their areas.

A `<think>` span is not <think>, and $5 is not math:
    area = side * side
#### 72 is no heading.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor

SIDES = 4  # of a square
LIMIT = {
    "largest":   9,   # odd spacing is kept
}


# why a square is frozen
@dataclass(frozen=True)
class Square:
    """Four equal sides."""

    side: float = 1.0
    """Metres."""
    notes: list = field(default_factory=list)

    @property
    def area(self) -> float:  # square metres
        return self.side ** 2


def root_of(area: float) -> float:
    """The side."""
    return math.sqrt(area)


def corner(tensor: Tensor) -> Tensor:
    """The first entry."""
    return tensor[0]
    # the end of the file
'''
ROOMS = '''"""Rooms are made of shapes."""

import math
from functools import cache

from smollm_trm.shapes import Square, root_of


@cache
def room_width(area: float) -> float:
    """Width of a square room."""
    return math.floor(root_of(area)) + Square().side
'''
NOTEBOOK = """# %% [markdown]
# # Rooms

# %% [imports]
import textwrap

# %% [markdown]
# ## Shapes

# %% [library]
# ground: What a room stands on.

# %% [markdown]
# ## Try it

# %% cellView="form"
#@title Settings
AREA = 16.0  #@param {type: "number"}
# %pip --version

# %%
width = room_width(AREA)
print(textwrap.dedent(f"{width} {SIDES} {corner.__name__}"))
"""


@pytest.fixture
def repo(tmp_path):
    """A small repository that builds."""
    for name, text in {
        "src/smollm_trm/__init__.py": "",
        "src/smollm_trm/shapes.py": SHAPES,
        "src/smollm_trm/rooms.py": ROOMS,
        "notebooks/demo_colab.py": NOTEBOOK,
    }.items():
        write(tmp_path / name, text)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    write(path, text.replace(old, new))


def built(repo):
    return build.build_notebook(repo / "notebooks/demo_colab.py", repo)


def code_of(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def cell_with(notebook, text):
    [cell] = [cell for cell in notebook.cells if text in cell.source]
    return cell


def test_comments_decorators_and_formatting_survive(repo):
    shapes = cell_with(built(repo), "class Square").source
    start, end = SHAPES.index("# why a square"), SHAPES.index("\n\n\ndef root_of")
    assert shapes.startswith("#@title shapes.py · Shapes and their areas\nSIDES = 4  # of a square\n")
    assert SHAPES[start:end] in shapes and shapes.endswith("    # the end of the file")


def test_a_module_has_one_cell_with_what_the_notebook_reaches(repo):
    notebook = built(repo)
    shapes = cell_with(notebook, "class Square")
    assert shapes is cell_with(notebook, "def root_of") is cell_with(notebook, "def corner")
    assert "LIMIT" not in shapes.source
    edit(repo / "notebooks/demo_colab.py", " {corner.__name__}", " {LIMIT}")
    shapes = cell_with(built(repo), "class Square").source
    assert '    "largest":   9,   # odd spacing is kept' in shapes and "def corner" not in shapes
    assert "Tensor" not in "".join(code_of(built(repo)))


def test_of_a_docstring_the_first_paragraph_stands_in_the_notebook(repo):
    long = '"""The side\n    of a square.\n\n    Args:\n        area: its size.\n    """\n'
    edit(repo / "src/smollm_trm/shapes.py", '"""The side."""\n', long)
    edit(repo / "src/smollm_trm/shapes.py", '"""Metres."""', '"""Metres,\n    never feet."""')
    cell = cell_with(built(repo), "class Square").source
    assert '    """The side\n    of a square."""\n    return math.sqrt(area)' in cell
    assert '    """Metres,\n    never feet."""\n' in cell


def test_what_is_reached_through_other_definitions_is_there_modules_behind_what_they_import(repo):
    write(repo / "src/smollm_trm/models/deep.py", '"""Deep."""\n\n\ndef deep(x):\n    return x\n')
    top = '"""Top."""\n\nfrom smollm_trm.models.deep import deep\n\nTOP = [deep]\n'
    write(repo / "src/smollm_trm/attic/top.py", top)
    edit(repo / "notebooks/demo_colab.py", "width = room", "print(TOP)\nwidth = room")
    sources = [cell.source for cell in built(repo).cells]
    places = [next(at for at, one in enumerate(sources) if part in one) for part in ("def deep", "TOP = [deep]")]
    assert places[0] < places[1]
    headings = [source.split("\n")[0] for source in sources if source.startswith("### The library")]
    assert headings == ["### The library: ground", "### The library: models", "### The library: attic"]


def test_modules_that_import_each_other_are_refused(repo):
    edit(repo / "src/smollm_trm/shapes.py", "import math\n", "import math\n\nfrom smollm_trm.rooms import room_width\n")
    with pytest.raises(BuildError, match="modules that import each other"):
        built(repo)


def test_a_part_has_its_sentence_and_is_folded_in_colab_and_jupyter(repo):
    notebook = built(repo)
    heading = cell_with(notebook, "### The library: ground")
    assert "What a room stands on." in heading.source
    assert notebook.metadata["colab"]["collapsed_sections"] == [heading.id] == [heading.metadata["id"]]
    assert heading.metadata["jp-MarkdownHeadingCollapsed"] is True


def test_contents_and_map_link_to_anchors_that_exist(repo):
    text = "# %% [markdown]\n# # Rooms\n# <!-- contents -->\n#\n# <!-- map -->\n#\n# <!-- badge -->"
    edit(repo / "notebooks/demo_colab.py", "# %% [markdown]\n# # Rooms", text)
    cells = built(repo).cells
    top = cells[0].source
    assert "[Try it](#try-it)" in top and "[ground](#the-library-ground): `shapes.py`, `rooms.py`" in top
    anchors = {name for cell in cells for name in re.findall(r'<a name="(.+?)"></a>', cell.source)}
    assert set(re.findall(r"\]\(#(.+?)\)", top)) <= anchors
    assert "(https://colab.research.google.com/)" in top
    write(repo / "pyproject.toml", '[project.urls]\nRepository = "https://github.com/me/mine"\n')
    assert "research.google.com/github/me/mine/blob/main/demo_colab.ipynb)" in built(repo).cells[0].source


def test_imports_are_collected_once_and_sorted_and_own_ones_dropped(repo):
    notebook = built(repo)
    assert notebook.cells[1].source == (
        "#@title Imports\nimport math\nimport textwrap\nfrom dataclasses import dataclass, field\n"
        "from functools import cache\n\nfrom torch import Tensor"
    )
    assert sum(source.count("import ") for source in code_of(notebook)) == 5
    assert not any("smollm_trm." in source for source in code_of(notebook))


def test_long_import_lines_are_wrapped(repo):
    names = ", ".join(f"a_rather_long_name_{number}" for number in range(9))
    edit(repo / "notebooks/demo_colab.py", "import textwrap", f"import textwrap\nfrom somewhere import {names}")
    assert "from somewhere import (\n    a_rather_long_name_0,\n" in built(repo).cells[1].source


def test_prose_and_run_cells_are_taken_as_they_are(repo):
    notebook = built(repo)
    settings = cell_with(notebook, "AREA = 16.0")
    assert settings.source == '#@title Settings\nAREA = 16.0  #@param {type: "number"}\n%pip --version'
    assert settings.metadata == {"cellView": "form"}
    assert notebook.cells[0].source == '# Rooms\n<a name="rooms"></a>'
    assert cell_with(notebook, "width = room_width").metadata == {}


def test_library_cells_are_folded_and_marked(repo):
    metadata = cell_with(built(repo), "class Square").metadata
    assert metadata == {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["library"]}


def test_a_build_holds_no_outputs_and_asks_colab_for_a_t4(repo):
    notebook = built(repo)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)
    assert notebook.metadata["accelerator"] == "GPU"
    colab = {"gpuType": "T4", "provenance": [], "toc_visible": True}
    assert colab.items() <= notebook.metadata["colab"].items()
    assert "widgets" not in notebook.metadata


def test_building_twice_gives_the_same_bytes(repo):
    assert build.built_files(repo) == build.built_files(repo)


def test_cell_ids_follow_the_content_and_not_the_position(repo):
    before = {cell.source: cell.id for cell in built(repo).cells}
    edit(
        repo / "notebooks/demo_colab.py",
        "# %% [markdown]\n# ## Try",
        "# %%\npass\n\n# %%\npass\n\n# %% [markdown]\n# ## Try",
    )
    cells = built(repo).cells
    assert {cell.source: cell.id for cell in cells if cell.source != "pass"} == before
    first, second = [cell.id for cell in cells if cell.source == "pass"]
    assert second == f"{first}-2"


def test_a_statement_that_two_modules_share_word_for_word_is_inlined_once(repo):
    shared = "logger = logging.getLogger(__name__)"
    edit(repo / "src/smollm_trm/shapes.py", "SIDES = 4", f"{shared}\nSIDES = 4")
    edit(repo / "src/smollm_trm/shapes.py", "import math", "import logging\nimport math")
    edit(repo / "src/smollm_trm/shapes.py", "    return math.sqrt", "    logger.info(area)\n    return math.sqrt")
    edit(repo / "src/smollm_trm/rooms.py", "@cache\n", f"{shared}  # for rooms\n\n\n@cache\n")
    edit(repo / "src/smollm_trm/rooms.py", "import math", "import logging\nimport math")
    assert sum(shared in source for source in code_of(built(repo))) == 1
    assert build.package_problems(repo) == []
    edit(repo / "src/smollm_trm/rooms.py", "getLogger(__name__)", "getLogger('rooms')")
    with pytest.raises(BuildError, match="logger clashes with logger"):
        built(repo)
    assert any("logger clashes" in problem for problem in build.package_problems(repo))


@pytest.mark.parametrize("marker", ["[inline] smollm_trm.shapes", "[lib]"])
def test_a_malformed_marker_is_refused(repo, marker):
    edit(repo / "notebooks/demo_colab.py", "# %% [library]", f"# %% {marker}\n\n# %% [library]")
    with pytest.raises(BuildError, match="demo_colab.py: .* is no marker"):
        built(repo)


@pytest.mark.parametrize("marker", ["imports", "library"])
def test_a_notebook_without_its_markers_is_refused(repo, marker):
    edit(repo / "notebooks/demo_colab.py", f"# %% [{marker}]", "# %%")
    with pytest.raises(BuildError, match=f"exactly one '# %% .{marker}.'"):
        built(repo)


def test_a_name_clash_is_refused_with_both_places(repo):
    edit(repo / "src/smollm_trm/rooms.py", "@cache\n", "def corner(): ...\n\n\n@cache\n")
    with pytest.raises(BuildError, match=r"rooms.py:9: corner clashes with corner in src/smollm_trm/shapes.py:38"):
        built(repo)
    assert any("corner clashes" in problem for problem in build.package_problems(repo))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "from math import cos as math",
            r"math is math(.cos)? here and math(.cos)? in src/smollm_trm/\w+.py:\d",
        ),
        (
            "from math import cos as cache",
            "cache is functools.cache here and math.cos in src/smollm_trm/rooms.py:3",
        ),
    ],
)
def test_an_import_that_means_two_things_is_refused(repo, line, message):
    edit(repo / "src/smollm_trm/rooms.py", "import math\n", f"{line}\n")
    with pytest.raises(BuildError, match=message):
        built(repo)
    assert any(re.search(message, problem) for problem in build.package_problems(repo))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from .shapes import Square", "absolute import by name"),
        ("from math import *", "absolute import by name"),
        ("from __future__ import annotations", "absolute import by name"),
        ("import smollm_trm.shapes", "at the top as 'from smollm_trm.x.y import Name'"),
        ("from smollm_trm import shapes", "at the top as"),
        ("from smollm_trm.shapes import Square as Quad", "at the top as"),
        ("def late():\n    from smollm_trm.shapes import Square", "at the top as"),
        ("HERE = __file__", "__file__ has no meaning in a notebook"),
        ("__all__ = ['room_width']", "__all__ has no meaning in a notebook"),
        ("print('imported')", "only imports and defines"),
        ("if SIDES:\n    SIDES = 5", "only imports and defines"),
        ("room_width.calls = 0", "only imports and defines"),
        ("first = 1; second = 2", "two statements on one line"),
        ("def twice(): ...\ndef twice(): ...", "twice is defined in line"),
        ("TEXT = 'from smollm_trm import train'", "this text imports smollm_trm"),
        ("# import smollm_trm first\nTEXT = 1", "this text imports smollm_trm"),
    ],
)
def test_what_a_notebook_cannot_hold_is_refused_with_its_place(repo, line, message):
    write(repo / "src/smollm_trm/rooms.py", f"{ROOMS}\n\n{line}\n")
    with pytest.raises(BuildError, match=r"src/smollm_trm/rooms.py:\d+: ") as caught:
        built(repo)
    assert message in str(caught.value)
    assert any(message in problem for problem in build.package_problems(repo))


def test_a_module_without_a_docstring_is_refused(repo):
    edit(repo / "src/smollm_trm/rooms.py", '"""Rooms are made of shapes."""', "")
    with pytest.raises(BuildError, match="rooms.py:1: no module docstring"):
        built(repo)


def test_a_module_that_does_not_parse_is_refused_with_its_line(repo):
    edit(repo / "src/smollm_trm/rooms.py", "@cache", "@cache (")
    with pytest.raises(BuildError, match=r"src/smollm_trm/rooms.py:9: "):
        built(repo)


def test_an_own_import_of_a_name_defined_nowhere_is_a_problem(repo):
    edit(repo / "src/smollm_trm/rooms.py", "import Square, root_of", "import Square, rot_of")
    assert build.package_problems(repo) == [
        "src/smollm_trm/rooms.py:6: smollm_trm.shapes defines no rot_of; import it from where it is defined"
    ]


@pytest.mark.parametrize("line", ["from smollm_trm.shapes import Square", "    import smollm_trm"])
def test_a_run_cell_that_imports_the_library_is_refused(repo, line):
    edit(
        repo / "notebooks/demo_colab.py",
        "width = room",
        f"if True:\n{line}\nwidth = room" if line[0] == " " else f"{line}\nwidth = room",
    )
    with pytest.raises(BuildError, match=r"cell \d+ \(.*imports smollm_trm; inline it instead"):
        built(repo)


def test_a_run_cell_that_replaces_a_library_name_is_refused(repo):
    edit(repo / "notebooks/demo_colab.py", "width = room", "root_of = 3\nwidth = room")
    with pytest.raises(BuildError, match=r"root_of would replace the root_of of cell \d+ \(shapes.py"):
        built(repo)


def test_what_a_run_cell_defines_in_the_library_s_place_is_left_out_with_all_that_only_it_reaches(repo):
    edit(repo / "src/smollm_trm/rooms.py", '"""Rooms are made of shapes."""', '"""Rooms."""')
    edit(repo / "src/smollm_trm/rooms.py", "@cache", "ROOMS = {1: Square}\n\n\n@cache")
    edit(repo / "src/smollm_trm/rooms.py", "+ Square().side", "+ len(ROOMS)")
    assert "class Square" in "".join(code_of(built(repo)))
    edit(repo / "notebooks/demo_colab.py", "stands on.", "stands on.\n# own: ROOMS")
    with pytest.raises(BuildError, match="ROOMS is bound by no cell|ROOMS is used before"):
        built(repo)
    edit(repo / "notebooks/demo_colab.py", "AREA = 16.0", "ROOMS = {}\nAREA = 16.0")
    cells = "".join(code_of(built(repo)))
    assert "class Square" not in cells and "ROOMS = {1" not in cells and "def root_of" in cells


def test_a_run_cell_may_bind_its_own_names_again_and_import_again(repo):
    edit(repo / "notebooks/demo_colab.py", "width = room", "import math\nwidth = 1\nwidth = room")
    built(repo)


@pytest.mark.parametrize(
    "line",
    [
        "print(later)",
        "print([later for _ in range(3)])",
        "@later\ndef decorated(): ...",
        "def with_default(value=later): ...",
        "def with_annotation(value: later): ...",
        "class Derived(later): ...",
        "class Field:\n    value: int = later",
        "del AREA\nlater = AREA",
    ],
)
def test_a_name_used_before_it_is_bound_is_refused(repo, line):
    edit(repo / "notebooks/demo_colab.py", "width = room", f"{line}\nlater = 1\nwidth = room")
    with pytest.raises(BuildError, match=r"cell 9 \(.*: (later|AREA) is used before any cell binds it"):
        built(repo)


@pytest.mark.parametrize(
    "line",
    [
        "f = lambda: later",
        "def inner():\n    return later\ndef f():\n    return inner()",
        "class f:\n    def __init__(self):\n        print(later)",
    ],
)
def test_what_the_functions_of_a_cell_use_must_be_bound_when_it_ends(repo, line):
    cells = f"# %%\n{line}\n\n# %%\nf()\n\n# %%\nlater = 1\nwidth = room"
    edit(repo / "notebooks/demo_colab.py", "# %%\nwidth = room", cells)
    with pytest.raises(BuildError, match=r"cell 9 \(.*: later is used before any cell binds it"):
        built(repo)


def test_a_run_cell_that_does_not_parse_is_refused_with_its_line(repo):
    edit(repo / "notebooks/demo_colab.py", "width = room", "%pip --version\nwidth = (\nwidth = room")
    with pytest.raises(BuildError, match=r"cell 6 \(%pip --version\): .*\(line \d of the cell\)"):
        built(repo)


def test_a_name_that_no_cell_binds_is_refused_also_inside_a_function(repo):
    edit(repo / "notebooks/demo_colab.py", "width = room", "def never():\n    return nowhere\nwidth = room")
    with pytest.raises(BuildError, match="nowhere is used before any cell binds it"):
        built(repo)


def test_a_library_function_whose_helper_is_missing_is_refused(repo):
    edit(repo / "src/smollm_trm/shapes.py", "    return math.sqrt(area)", "    return _helped(area)")
    with pytest.raises(BuildError, match=r"cell \d+ \(shapes.py\): _helped is bound by no cell up to cell"):
        built(repo)


@pytest.mark.parametrize(
    "line",
    [
        "def uses_later():\n    return later",
        "class Uses:\n    def later_too(self):\n        return later",
        "try:\n    import absent\nexcept ImportError as error:\n    absent = str(error)\nprint(absent)",
        "class Scoped:\n    a = 1\n    b = a\nprint(Scoped.b)",
        "squares = {n: [m for m in range(n)] for n in range(3)}\nprint(squares, __name__, get_ipython)",
        "for number in range(3):\n    total = number\nprint(total, number)",
        "with open('x') as file:\n    print(file)",
        "if (found := max(1, 2)) > 1:\n    print(found)",
        "!ls\n%matplotlib inline\nif AREA:\n    !pwd",
    ],
)
def test_names_bound_in_time_are_accepted(repo, line):
    magics = line.replace("!", "# !").replace("%m", "# %m") if line.startswith("!") else line
    edit(repo / "notebooks/demo_colab.py", "width = room", f"{magics}\nlater = 1\nwidth = room")
    built(repo)


def test_check_fails_until_the_notebook_is_what_a_build_would_write(repo, capsys):
    assert build.main(["--check"], repo) == 1
    assert "demo_colab.ipynb is not what a build would write; run 'make notebook'" in capsys.readouterr().err
    assert not (repo / "demo_colab.ipynb").exists()
    assert build.main([], repo) == 0
    assert build.main(["--check"], repo) == 0
    edit(repo / "src/smollm_trm/shapes.py", "Four equal sides", "Four sides")
    assert build.main(["--check"], repo) == 1


def test_check_reports_every_module_even_one_that_no_notebook_inlines(repo, capsys):
    write(repo / "src/smollm_trm/aside.py", "print('no docstring either')\n")
    build.main([], repo)
    assert build.main(["--check"], repo) == 1
    assert capsys.readouterr().err.count("src/smollm_trm/aside.py:1: ") == 2


def test_a_refused_build_leaves_the_old_notebook(repo, capsys):
    build.main([], repo)
    before = (repo / "demo_colab.ipynb").read_bytes()
    edit(repo / "src/smollm_trm/rooms.py", "import math", "from .shapes import Square")
    assert build.main([], repo) == 1
    assert "absolute import" in capsys.readouterr().err
    assert (repo / "demo_colab.ipynb").read_bytes() == before


def test_a_notebook_that_grew_too_large_is_refused(repo):
    edit(repo / "notebooks/demo_colab.py", "# # Rooms", "# # Rooms\n#\n# " + "long " * (build.LARGEST // 5))
    with pytest.raises(BuildError, match=f"demo_colab.ipynb has 4.* bytes, more than {build.LARGEST}"):
        build.built_files(repo)


GUIDE = """# Guide
<!-- structure: demo_colab.ipynb -->
| stale |
<!-- /structure -->
Set the area in cell <!-- cells: demo_colab.ipynb / Try it -->99<!-- /cells -->.
"""


def test_a_guide_shows_the_cells_of_the_built_notebook(repo):
    write(repo / "GUIDE.md", GUIDE)
    assert build.main([], repo) == 0
    guide = (repo / "GUIDE.md").read_text()
    assert "| stale |" not in guide
    assert "\n| 1-2 | **Rooms** |  |\n" in guide
    assert "\n| 3-6 | **Shapes** |  |\n" in guide
    names = "`SIDES`, `Square`, `root_of`, `corner`, `room_width`"
    assert f"\n| 4-6 | The library: ground | {names} |\n" in guide
    assert "\n| 7-9 | **Try it** | `AREA`, `width` |\n" in guide
    assert "Set the area in cell <!-- cells: demo_colab.ipynb / Try it -->7-9<!-- /cells -->." in guide
    assert build.main(["--check"], repo) == 0
    edit(repo / "GUIDE.md", ">7-9<", ">7-12<")
    assert build.main(["--check"], repo) == 1


def test_a_guide_that_names_no_section_or_notebook_is_refused(repo):
    write(repo / "GUIDE.md", GUIDE.replace("/ Try it", "/ Try"))
    with pytest.raises(BuildError, match=r"GUIDE.md: 0 headings of demo_colab.ipynb are 'Try'; nearest: \['Try it'\]"):
        build.built_files(repo)
    write(repo / "GUIDE.md", GUIDE.replace("structure: demo", "structure: other"))
    with pytest.raises(BuildError, match="GUIDE.md: a marker names other_colab.ipynb"):
        build.built_files(repo)


# ---- what the runs need ---------------------------------------------------------------------

RUNS = """
# %% [markdown]
# <!-- needs -->
# <!-- /needs -->

# %%
RUNS = {
    "quick": {"num_latents": 64, "batch_size": 4, "num_epochs": 1, "max_samples": 1000},
    "full": {"num_latents": 256, "batch_size": 2, "num_epochs": 3},
}
AROUND = {"quick": {"dev": 200, "compared": 200}, "full": {"dev": None, "compared": None}}
"""


def traced(peak: float, run: str = "quick", **changes) -> dict:
    """One run of a `t4_memory` line."""
    settings = {"batch_size": {"quick": 4, "full": 2}[run], "use_trm": True, **changes}
    return {"run": run, "changes": changes, "settings": settings, "peak": peak, "where": "training"}


@pytest.fixture
def measured(repo):
    """The small repository with runs in its notebook, a guide that shows what they need, and a writer of results."""
    with open(repo / "notebooks/demo_colab.py", "a", encoding="utf-8") as file:
        file.write(RUNS)
    write(repo / "GUIDE.md", "<!-- needs: demo_colab.ipynb -->\n| stale |\n<!-- /needs -->\n")

    def measure(*lines: dict) -> None:
        lines = [{"name": "t4_memory", "figures": figures} for figures in lines] + [{"name": "study", "figures": {}}]
        write(repo / "benchmarks/results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    return measure


def test_the_table_of_needs_holds_the_last_measurement_and_says_how_each_figure_was_found(repo, measured):
    plain = {"plain": traced(10.25, use_trm=False), "with TRM": traced(11.3)}
    measured({"plain": traced(9.0)}, {**plain, "small batch": traced(9.4, batch_size=1)})
    guide = build.built_files(repo)[repo / "GUIDE.md"]
    head = "| peak memory, GiB (**traced**) | training (**estimated**) | answering the dev problems (**estimated**) |"
    assert head in guide and "stale" not in guide
    assert "| plain | none | 4 | 10.2, in training | 4-6 min | 3-5 min |" in guide
    assert "| with TRM | 64 | 4 | 11.3, in training | 6-11 min | twice 3-5 min |" in guide
    assert "| small batch | 64 | 1 | 9.4, in training |  |  |" in guide
    assert "(**estimated**): `quick` 27-46 min, `full` 6.2-10.1 h." in guide
    [shown] = [cell.source for cell in built(repo).cells if "needs" in cell.source and cell.cell_type == "markdown"]
    assert "| with TRM | 64 " in shown and "small batch" not in shown


def test_answers_that_are_given_at_once_take_less_time_but_the_base_writes_its_steps():
    run = {"num_latents": 16, "num_epochs": 1, "dev": 200, "compared": 300}
    at_once = {**run, "target": "answer"}
    assert training_minutes(at_once, 16)[1] < 0.7 * training_minutes(run, 16)[1]
    assert answering_minutes(at_once)[1] < 0.2 * answering_minutes(run)[1]
    assert answering_minutes(at_once, base=True) == answering_minutes(run)
    often = {**at_once, "val_check_interval": 0.2}
    assert training_minutes(often, 16)[0] > training_minutes(at_once, 16)[0]


def test_the_settings_of_every_run_stand_in_a_table(repo, measured):
    measured({"plain": traced(10.25, use_trm=False)})
    edit(repo / "notebooks/demo_colab.py", "# <!-- needs -->", "# <!-- runs -->\n#\n# <!-- needs -->")
    [shown] = [cell.source for cell in built(repo).cells if "| setting |" in cell.source]
    assert "| setting | `quick` | `full` |" in shown and "| `num_latents` | 64 | 256 |" in shown
    assert "| `max_samples` | 1000 |  |" in shown


def test_needs_that_were_not_measured_or_with_other_settings_are_refused(repo, measured):
    with pytest.raises(BuildError, match=r"holds no t4_memory; run 'python benchmarks/t4_memory.py --record'"):
        build.built_files(repo)
    measured({"with TRM": traced(11.3)})
    edit(repo / "notebooks/demo_colab.py", '"batch_size": 4', '"batch_size": 8')
    with pytest.raises(BuildError, match="t4_memory has batch_size=4 for with TRM, not 8; run"):
        build.built_files(repo)


# ---- the real package ----------------------------------------------------------------------


@pytest.fixture(params=build.notebook_sources() or [None], ids=lambda source: source.stem if source else "none")
def source(request):
    """The percent source of every committed notebook."""
    if request.param is None or not notebook_path(request.param).is_file():
        pytest.skip("the notebook is not built yet: run 'make notebook'")
    return request.param


def notebook_path(source):
    return ROOT / f"{source.stem}.ipynb"


def committed(source):
    return nbformat.read(notebook_path(source), as_version=nbformat.NO_CONVERT)


def library_cells(source):
    """(module's text, cell's text without its title) of every library cell but the imports."""
    for cell in committed(source).cells:
        if cell.cell_type == "code" and "library" in cell.metadata.get("tags", []):
            title, _, text = cell.source.partition("\n")
            if title != "#@title Imports":
                path = title.removeprefix("#@title ").partition(" · ")[0]
                yield ROOT.joinpath("src/smollm_trm", path).read_text(encoding="utf-8"), text


def bound_by(node):
    """The names that a top-level statement binds."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    parts = [part.id for one in targets if one for part in ast.walk(one) if isinstance(part, ast.Name)]
    return [node.name] if hasattr(node, "name") else parts


def without_long_docstrings(tree):
    """A syntax tree's dump in which every docstring ends with its first paragraph."""
    for node in ast.walk(tree):
        for one in getattr(node, "body", None) if isinstance(getattr(node, "body", None), list) else ():
            if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
                one.value.value = re.split(r"\n\s*\n", one.value.value)[0].rstrip()
    return ast.dump(tree)


def run_cells(source):
    """The code cells of the percent source that are no markers."""
    cells = jupytext.read(source, fmt="py:percent").cells
    return [c.source for c in cells if c.cell_type == "code" and not c.metadata.get("title", "").startswith("[")]


def test_every_module_keeps_the_rules_of_inlining():
    assert build.package_problems(ROOT) == []


def test_the_committed_files_are_a_fresh_build():
    """Byte for byte, and so two builds of two processes are the same."""
    if not any(notebook_path(source).is_file() for source in build.notebook_sources()):
        pytest.skip("the notebook is not built yet: run 'make notebook'")
    fresh = build.built_files(ROOT)
    assert {path.name: path.read_text(encoding="utf-8") == text for path, text in fresh.items()} == {
        path.name: True for path in fresh
    }


def test_every_library_cell_is_its_source_but_for_the_ends_of_docstrings(source):
    found = list(library_cells(source))
    assert len(found) > 40
    for module, text in found:
        own = [without_long_docstrings(node) for node in ast.parse(module).body if not imports_of(node)]
        taken = [without_long_docstrings(node) for node in ast.parse(text).body]
        assert [one for one in own if one in taken] == taken, text.split("\n")[0]
        lines = iter(module.split("\n"))
        for line in (one for one in text.split("\n") if not one.endswith('"""')):  # comments and formatting too
            assert line in lines, line


def test_every_definition_stands_once_and_run_cells_as_they_are_written(source):
    names = Counter(
        name for _, text in library_cells(source) for node in ast.parse(text).body for name in bound_by(node)
    )
    assert {name for name, count in names.items() if count > 1} == set()
    code = Counter(code_of(committed(source)))
    code.subtract(run_cells(source))
    assert min(code.values()) >= 0, "a run cell of the source is missing"
    assert len([cell for cell in committed(source).cells if cell.cell_type == "markdown"]) + len(run_cells(source)) < 80


def test_nothing_imports_the_library(source):
    for text in code_of(committed(source)):
        for node in ast.walk(ast.parse(python_of(text))):
            assert not any(one.own for one in imports_of(node))


def test_every_name_is_bound_before_use(source):
    cells = [cell for cell in committed(source).cells if cell.cell_type == "code"]
    live = set(run_cells(source))
    checked = [CodeCell(f"code cell {n}", cell.source, cell.source in live) for n, cell in enumerate(cells, 1)]
    assert name_problems(checked) == []


def test_the_committed_notebook_is_valid_small_and_has_not_been_run(source):
    notebook = committed(source)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook_path(source).stat().st_size <= build.LARGEST
    assert "widgets" not in notebook.metadata
    assert all(cell.outputs == [] for cell in notebook.cells if cell.cell_type == "code")
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_the_guide_shows_the_structure_of_the_main_notebook(source):
    if source.stem != "smollm_trm_colab":
        pytest.skip("only the main notebook has a guide")
    notebook = committed(source)
    assert len(sections_of(notebook)) > 5
    assert structure_table(notebook) in (ROOT / "COLAB_NOTEBOOK_GUIDE.md").read_text(encoding="utf-8")

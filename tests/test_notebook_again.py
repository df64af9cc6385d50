"""The notebook as its reader comes back to it: *Run all* once more, and every cell once more."""

import nbformat
import pytest
from executed_notebook import FEWER, NOTEBOOK, ExecutedNotebook


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_run_all_may_be_pressed_again_and_every_cell_stays_usable(tmp_path):
    code = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    first = next(at for at, source in enumerate(code) if "def count(part" in source)
    again = "\n\n".join(code[first:])  # every cell behind the training once more, in the last one
    run = ExecutedNotebook(tmp_path, {**FEWER, code[-1]: f"{code[-1]}\n\n{again}"}, twice=True)
    for inside in ("def count(part", "from_pretrained(saved"):
        assert run.output(inside, again=True) == run.output(inside)

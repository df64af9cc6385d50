"""The whole notebook, cut down to seconds, under the versions that Colab's image had when this was written.

    make notebook-run-colab

The folder named by COLAB_PACKAGES holds those of Colab's packages that differ from the installed ones; the kernel
finds it first. Nothing here is about what the run learns: `test_notebook_run.py` runs the notebook as it is.
"""

import json
import os
from pathlib import Path

import pytest
from executed_notebook import FEWER, ExecutedNotebook

from smollm_trm.evaluation.loading import problems_of

PACKAGES = os.environ.get("COLAB_PACKAGES")
COLAB = {"transformers": "5.15.0", "peft": "0.20.0"}  # as in the Makefile
SAYING = 'import peft, transformers\nprint(f"transformers {transformers.__version__}, peft {peft.__version__}")\n'


@pytest.mark.notebook
@pytest.mark.skipif(not PACKAGES, reason="COLAB_PACKAGES names no folder: run 'make notebook-run-colab'")
def test_every_cell_runs_under_colab_s_versions(tmp_path, monkeypatch):
    changes = {**FEWER, 'print("installed:"': f'{SAYING}print("installed:"'}
    run = ExecutedNotebook(tmp_path, changes, packages=Path(PACKAGES).resolve())
    said = run.output('print("installed:"')
    assert ", ".join(f"{name} {version}" for name, version in COLAB.items()) in said and "nothing to install" in said
    guard = run.output("192.0.2.1")
    assert "the library is hidden" in guard and "the network is off" in guard
    assert all(cell.execution_count for cell in run.cells if cell.cell_type == "code" and cell.source.strip())
    assert "<b>LoRA + TRM, latents shuffled</b>" in run.output("report_comparison(")
    assert "the same answer again" in run.output("from_pretrained(saved")
    [results] = (run.folder / "outputs/smoke").glob("lora_trm-*/results.json")
    results = json.loads(results.read_text())
    assert COLAB.items() <= results["versions"].items()
    monkeypatch.chdir(run.folder)
    data, model = results["settings"]["data_dir"], "outputs/smoke/model"
    rows, _ = problems_of("dev", data_dir=data, dataset_path=None, seed=0, models=[model])
    assert len(rows) == 40

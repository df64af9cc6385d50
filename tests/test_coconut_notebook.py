"""Coconut's notebook, run top to bottom without the library and the network, at a size at which nothing is learnt."""

import pytest
from executed_notebook import ROOT, ExecutedNotebook

SMALL = {
    '"word_problems": 9_000': '"word_problems": 400',
    '"compared": 200': '"compared": 4',
    '"chain": 3, "stage": 1': '"chain": 1, "stage": 1',
}


@pytest.mark.notebook
def test_the_coconut_notebook_runs_from_the_chain_to_a_saved_model(tmp_path):
    run = ExecutedNotebook(tmp_path, SMALL, path=ROOT / "coconut_colab.ipynb")
    stages = run.output("enter_stage(stage, epoch=stage)")
    assert stages.count("<|latent|>") == 2 + 4 + 4 and "stage 3" in stages
    table = run.output("evaluate_arm(name, module")
    assert "Coconut, latents shuffled" in table and "CoT match of the chain" in table
    assert "Coconut: " in run.output("loaded = SmolLMv3WithTRM")
    assert (run.folder / "outputs" / "coconut_smoke" / "coconut" / "model" / "config.json").is_file()

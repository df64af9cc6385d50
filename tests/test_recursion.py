"""The recursion is the paper's, and only its last round learns."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from smollm_trm.models.blocks import SelfAttention, SwiGLU, TinyRecursiveNetwork, TransformerBlock, rms_norm
from smollm_trm.models.reasoners.compressor import LatentAttentionCompressor
from smollm_trm.models.recursion import RecursiveReasoningBase
from smollm_trm.records import UserMistake

HERE = Path(__file__).parent / "data"
ORACLES = Path(os.environ.get("ORACLES_DIR", Path(__file__).parents[2] / "shared" / "oracles"))


def make_recursion(**counts: int) -> RecursiveReasoningBase:
    torch.manual_seed(0)
    return RecursiveReasoningBase(network=TinyRecursiveNetwork(dim=16, n_layers=1, n_heads=2), **counts)


@pytest.mark.parametrize("file", [HERE / "trm_recursion_small.safetensors", ORACLES / "trm_recursion.safetensors"])
def test_matches_the_reference_recursion_on_shared_weights(file):
    """The small file comes from a plain reimplementation that reproduces the large one, the reference's own."""
    if not file.is_file():
        pytest.skip(f"the reference outputs {file.name} are not here (set ORACLES_DIR)")
    oracle = load_file(file)
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    width = oracle["state_dict.L_level.layers.0.mlp.down_proj.weight"].shape[1]
    network = TinyRecursiveNetwork(dim=config["hidden_size"], n_layers=2, n_heads=config["num_heads"])
    for layer in network.layers:
        layer.mlp = SwiGLU(dim=config["hidden_size"], width=width)
    weights = {}
    for index in range(2):
        theirs = f"state_dict.L_level.layers.{index}."
        weights[f"layers.{index}.attention.qkv.weight"] = oracle[theirs + "self_attn.qkv_proj.weight"]
        weights[f"layers.{index}.attention.out.weight"] = oracle[theirs + "self_attn.o_proj.weight"]
        weights[f"layers.{index}.mlp.gate_up.weight"] = oracle[theirs + "mlp.gate_up_proj.weight"]
        weights[f"layers.{index}.mlp.down.weight"] = oracle[theirs + "mlp.down_proj.weight"]
    network.load_state_dict(weights)
    recursion = RecursiveReasoningBase(network=network, n_latent_steps=6, n_deep_recursions=3, n_supervision_steps=1)
    recursion.initial_answer.copy_(oracle["state_dict.H_init"])
    recursion.initial_latent.copy_(oracle["state_dict.L_init"])
    question = oracle["x"].clone().requires_grad_()
    answer, latent = recursion.refine(question, *recursion.start(question))
    head = oracle["state_dict.lm_head.weight"].clone().requires_grad_()
    logits = (answer @ head.T)[:, config["puzzle_emb_len"] :]
    halting = answer[:, 0] @ oracle["state_dict.q_head.weight"][0] + oracle["state_dict.q_head.bias"][0]
    # The reference's loss: its "stablemax" cross-entropy, a mean per row and a sum over rows, and the halting loss.
    scores = torch.where(logits < 0, 1 / (1 - logits), logits + 1).double()
    right = (scores / scores.sum(-1, keepdim=True)).gather(-1, oracle["labels"].unsqueeze(-1))
    halting_loss = F.binary_cross_entropy_with_logits(halting, torch.zeros(2), reduction="sum")
    loss = -right.log().mean((1, 2)).sum() + 0.5 * halting_loss
    loss.backward()
    for ours, theirs in ((answer, "y"), (latent, "z"), (logits, "logits"), (halting, "q_halt")):
        assert torch.allclose(ours, oracle[theirs], atol=2e-4)
    assert torch.allclose(loss, oracle["loss"], atol=2e-4)
    for index, layer in enumerate(network.layers):
        theirs = f"grads.L_level.layers.{index}."
        assert torch.allclose(layer.attention.qkv.weight.grad, oracle[theirs + "self_attn.qkv_proj.weight"], atol=2e-4)
        assert torch.allclose(layer.mlp.down.weight.grad, oracle[theirs + "mlp.down_proj.weight"], atol=2e-4)
    assert torch.allclose(head.grad, oracle["grads.lm_head.weight"], atol=2e-4)


def test_only_the_last_round_carries_gradients():
    recursion = make_recursion(n_latent_steps=2, n_deep_recursions=3, n_supervision_steps=1)
    recorded = []
    recursion.network.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    recursion(torch.randn(2, 3, 16))
    assert recorded == [False] * 6 + [True] * 3


def test_the_steps_before_the_last_run_without_gradient_and_give_the_same_answers():
    recursion = make_recursion(n_latent_steps=2, n_deep_recursions=2, n_supervision_steps=3)
    question = torch.randn(2, 3, 16)
    cheap, dear = recursion(question), recursion(question, gradient_at_every_step=True)
    assert [answer.requires_grad for answer in cheap] == [False, False, True]
    assert all(answer.requires_grad for answer in dear)
    assert all(torch.equal(a, b) for a, b in zip(cheap, dear, strict=True))
    assert torch.equal(recursion(question, n_supervision_steps=2)[-1], cheap[1])


def test_states_stay_of_size_one_however_long_it_thinks():
    recursion = make_recursion(n_latent_steps=4, n_deep_recursions=2, n_supervision_steps=12)
    sizes = [answer.square().mean().sqrt() for answer in recursion(10 * torch.randn(2, 3, 16))]
    assert all(torch.isclose(size, torch.ones(()), atol=1e-2) for size in sizes)


def test_masked_positions_change_nothing():
    network = TinyRecursiveNetwork(dim=16, n_layers=2, n_heads=2)
    states, mask = torch.randn(1, 5, 16), torch.tensor([[1, 1, 1, 0, 0]])
    other = states.clone()
    other[:, 3:] = 9.0
    assert torch.allclose(network(states, mask)[:, :3], network(other, mask)[:, :3], atol=1e-6)


def test_the_compressor_ignores_padding_and_takes_any_length():
    torch.manual_seed(0)
    compressor = LatentAttentionCompressor(input_dim=8, dim=16, num_latents=5, n_heads=2)
    states = torch.randn(1, 7, 8)
    padded = torch.cat([torch.full((1, 4, 8), 50.0), states], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    assert torch.allclose(compressor(states), compressor(padded, mask), atol=1e-5)
    assert compressor(torch.randn(2, 1, 8)).shape == (2, 5, 16)


def test_what_was_attended_dominates_the_learned_queries():
    shares = []
    for query_scale in (0.1, 1.0):
        torch.manual_seed(0)
        compressor = LatentAttentionCompressor(input_dim=8, dim=64, num_latents=5, n_heads=2)
        compressor.query_scale = query_scale
        latents = compressor(torch.randn(40, 7, 8)).detach()
        shares.append(float(latents.var(0).mean() / latents.square().mean()))
    assert shares[0] > 0.7 > 0.5 > shares[1]


def test_rms_norm_brings_every_state_to_size_one():
    assert torch.allclose(rms_norm(7 * torch.randn(3, 64)).square().mean(-1), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("name", ["n_latent_steps", "n_deep_recursions", "n_supervision_steps"])
def test_zero_rounds_are_refused_by_name(name):
    with pytest.raises(UserMistake, match=f"{name}=0: must be at least 1"):
        make_recursion(**{name: 0})


def test_heads_that_do_not_divide_and_empty_networks_are_refused():
    with pytest.raises(UserMistake, match="n_heads=3 must divide the width 16"):
        SelfAttention(dim=16, n_heads=3)
    with pytest.raises(UserMistake, match="n_heads=5"):
        TransformerBlock(dim=16, n_heads=5)
    with pytest.raises(UserMistake, match="n_layers=0"):
        TinyRecursiveNetwork(dim=16, n_layers=0)
    with pytest.raises(UserMistake, match="compression_heads=3 must divide the latent width 16"):
        LatentAttentionCompressor(input_dim=8, dim=16, num_latents=2, n_heads=3)
    with pytest.raises(UserMistake, match="num_latents=0"):
        LatentAttentionCompressor(input_dim=8, dim=16, num_latents=0, n_heads=2)


def test_a_scaled_branch_cannot_drown_the_state_however_large_it_grows():
    torch.manual_seed(0)
    states = torch.randn(64, 3, 16)
    variations = {}
    for branch_scale in (None, 0.3):
        network = TinyRecursiveNetwork(dim=16, n_layers=2, n_heads=2, branch_scale=branch_scale)
        for layer in network.layers:  # a branch that says the same, loudly, to every problem
            layer.mlp.down.register_forward_hook(lambda module, inputs, output: 0 * output + 1000.0)
        varied = network(states).detach()
        variations[branch_scale] = float(varied.var(0).mean() / varied.square().mean())
    assert variations[None] < 1e-4 and variations[0.3] > 0.5


def test_a_step_by_hand():
    recursion = make_recursion(n_latent_steps=2, n_deep_recursions=2, n_supervision_steps=2)
    question = torch.randn(2, 3, 16)
    answer, latent = recursion.initial_answer, recursion.initial_latent
    for _ in range(4):
        for _ in range(2):
            latent = recursion.network(question + answer + latent)
        answer = recursion.network(answer + latent)
    assert torch.allclose(recursion(question)[-1], answer, atol=1e-5)


def test_started_from_the_question_answer_and_latent_begin_as_it():
    recursion = make_recursion(n_latent_steps=1, n_deep_recursions=1, n_supervision_steps=1, from_question=True)
    question = torch.randn(2, 3, 16)
    latent = recursion.network(3 * question)
    assert torch.allclose(recursion(question)[0], recursion.network(question + latent), atol=1e-5)


def test_no_gradient_flows_from_a_supervision_step_into_the_one_before():
    recursion = make_recursion(n_latent_steps=1, n_deep_recursions=1, n_supervision_steps=2)
    question, gradients = torch.randn(2, 3, 16), []
    for gradient_at_every_step in (False, True):
        recursion.zero_grad()
        recursion(question, gradient_at_every_step=gradient_at_every_step)[-1][..., 0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in recursion.parameters()])
    assert all(torch.allclose(cheap, dear, atol=1e-6) for cheap, dear in zip(*gradients, strict=True))

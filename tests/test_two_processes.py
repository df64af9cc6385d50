"""Two processes train as one does with the doubled batch."""

import csv
import json
import socket
from pathlib import Path

import pytest
import torch
from processes import ended, started
from runs import ROWS, newest_checkpoint, plain_descent, save_tiny_base, seen_gradients, train_tiny
from two_processes import ALONE, FIRST, WHOLE


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("processes")
    base = save_tiny_base(folder / "base")
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    ranks = [{**place, "WORLD_SIZE": "2", "LOCAL_RANK": rank} for rank in "01"]  # what a launcher tells each process
    both = [started("two_processes", "main", base, str(folder / "two"), **environment) for environment in ranks]
    with pytest.MonkeyPatch.context() as patch:
        plain_descent(patch)
        train_tiny(base, folder / "one", **ALONE)
        train_tiny(base, folder / "one" / "reasoner_first", **{**ALONE, **FIRST})
        gradients = seen_gradients(patch)
        train_tiny(base, folder / "whole", **WHOLE)
        torch.save(gradients, folder / "one" / "gradients-0.pt")
    assert [ended(process) for process in both] == [0, 0]
    return folder / "one", folder / "two"


def column(folder: Path, name: str) -> dict[int, float]:
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


@pytest.mark.parametrize("name", ["train_loss", "dev_loss", "grad_norm"])
def test_two_processes_give_the_losses_of_one_with_the_doubled_batch(folders, name):
    one, two = (column(folder, name) for folder in folders)
    assert len(one) >= 3 and one.keys() == two.keys()
    assert two == {step: pytest.approx(value, abs=1e-5) for step, value in one.items()}


def test_two_processes_of_accumulated_batches_give_the_gradients_of_one_large_batch(folders):
    whole, first = (torch.load(folder / "gradients-0.pt", weights_only=True) for folder in folders)
    second = torch.load(folders[1] / "gradients-1.pt", weights_only=True)
    assert len(whole) == len(first) == len(second) == 6
    for expected, *both in zip(whole, first, second, strict=True):
        for found in both:
            assert expected.keys() == found.keys()
            assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-5
    assert max(float(gradient.abs().max()) for gradient in whole[0].values()) > 1e-2


def test_the_weights_agree_at_the_end(folders):
    one, two = (newest_checkpoint(folder) for folder in folders)
    assert one["global_step"] == two["global_step"] == 6
    for name, weight in one["state_dict"].items():
        assert (two["state_dict"][name] - weight).abs().max() < 1e-5, name
    result, shared = (json.loads((folder / "results.json").read_text()) for folder in folders)
    assert shared["dev_loss"] == pytest.approx(result["dev_loss"], abs=1e-5)
    assert (folders[1] / "model" / "model.safetensors").is_file()


def test_both_processes_hold_the_same_model_and_share_the_test_problems(folders):
    first, second = (json.loads((folders[1] / f"process-{rank}.json").read_text()) for rank in (0, 1))
    assert first["strategy"] == "DDPStrategy" and first["weights"] == second["weights"]
    assert first["accuracy"] == second["accuracy"] == pytest.approx(0.8)
    assert sorted(first["asked"] + second["asked"]) == sorted(row["question"] for row in ROWS[36:41])


def test_two_processes_train_the_reasoner_alone_as_one_does(folders):
    first, second = (json.loads((folders[1] / f"process-{rank}.json").read_text()) for rank in (0, 1))
    assert first["reasoner_first"] == second["reasoner_first"]
    one, two = (newest_checkpoint(folder / "reasoner_first" / "reasoner") for folder in folders)
    assert one["global_step"] == two["global_step"] == 2
    for name, weight in one["state_dict"].items():
        assert (two["state_dict"][name] - weight).abs().max() < 1e-5, name

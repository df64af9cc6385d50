"""The pictures: drawn from what is in the files, readable, written whole."""

import inspect
from pathlib import Path

import matplotlib
import pytest
from test_compare import ARMS

from smollm_trm.evaluation.compare import compare_arms
from smollm_trm.evaluation.plots import plot_attention, plot_comparison, plot_halting, plot_losses
from smollm_trm.records import UserMistake

PNG = b"\x89PNG\r\n\x1a\n"


def write_metrics(path: Path, steps: int = 200, latents: bool = True) -> Path:
    """As Lightning's CSVLogger writes it: training and dev in rows of their own, empty cells between."""
    lines = ["dev_loss,epoch,latent_variation,lr-AdamW,step,train_loss"]
    for step in range(0, steps, 5):
        variation = f"{0.7 * 0.99**step:.4f}" if latents else ""
        lines.append(f",0,{variation},0.001,{step},{3 * 0.99**step + 0.5 + (step % 3) / 10:.4f}")
        if step % 50 == 45:
            lines.append(f"{3 * 0.99**step + 0.7:.4f},0,,,{step},")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_loss_curves_show_what_the_file_holds(tmp_path):
    runs = {"LoRA": write_metrics(tmp_path / "a.csv", latents=False), "LoRA + TRM": write_metrics(tmp_path / "b.csv")}
    figure = plot_losses(runs, tmp_path / "plots" / "losses.png")
    losses, variation = figure.axes
    labels = [line.get_label() for line in losses.lines if not line.get_label().startswith("_")]
    assert labels == ["LoRA, train", "LoRA, dev", "LoRA + TRM, train", "LoRA + TRM, dev"]
    dev = next(line for line in losses.lines if line.get_label() == "LoRA, dev")
    assert list(dev.get_xdata()) == [45, 95, 145, 195] and dev.get_ydata()[0] == pytest.approx(2.6086, abs=1e-3)
    assert [line.get_label() for line in variation.lines if line.get_label()[0] != "_"] == ["LoRA + TRM"]
    assert "nats" in losses.get_ylabel() and "std / rms" in variation.get_ylabel()
    assert variation.get_xlabel() == "optimizer step"
    assert (tmp_path / "plots" / "losses.png").read_bytes().startswith(PNG)
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["losses.png"]


def test_a_run_without_latents_has_no_empty_panel(tmp_path):
    assert len(plot_losses({"LoRA": write_metrics(tmp_path / "a.csv", latents=False)}, tmp_path / "a.png").axes) == 1


def test_a_run_without_validations_has_no_dev_curve(tmp_path):
    runs = {"short": write_metrics(tmp_path / "a.csv", steps=40, latents=False)}
    (losses,) = plot_losses(runs, tmp_path / "a.png").axes
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["short, train"]


def test_a_line_cut_off_by_a_crash_is_skipped(tmp_path):
    file = write_metrics(tmp_path / "a.csv")
    file.write_text(file.read_text() + ",0,0.5,0.001,200,-")
    assert len(plot_losses({"a": file}, tmp_path / "a.png").axes) == 2


def test_files_without_losses_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.csv"):
        plot_losses({"a": tmp_path / "gone.csv"}, tmp_path / "a.png")
    (tmp_path / "other.csv").write_text("step,speed\n1,2\n")
    with pytest.raises(UserMistake, match="other.csv holds no loss: expected a column train_loss"):
        plot_losses({"a": tmp_path / "other.csv"}, tmp_path / "a.png")
    with pytest.raises(UserMistake, match="at least one"):
        plot_losses({}, tmp_path / "a.png")


def test_every_bar_has_its_interval_and_its_verdict(tmp_path):
    comparison = compare_arms(ARMS)
    figure = plot_comparison(comparison, tmp_path / "arms.png")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ARMS)
    for bar, arm, caps in zip(axes.patches, comparison.arms, axes.collections, strict=True):
        (interval,) = caps.get_segments()
        assert bar.get_width() == pytest.approx(100 * arm.accuracy)
        assert sorted(interval[:, 0]) == pytest.approx([100 * arm.interval[0], 100 * arm.interval[1]])
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == "40.0%" and "latents used" in texts[2]
    assert "too few problems to tell" in texts[4] and "latents ignored" in texts[6]
    assert "n = 100" in axes.get_xlabel() and "95%" in axes.get_xlabel()
    assert (tmp_path / "arms.png").read_bytes().startswith(PNG)


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_comparison(compare_arms(ARMS), tmp_path / "arms.png")
    plot_losses({"a": write_metrics(tmp_path / "a.csv")}, tmp_path / "losses.png")
    assert dict(matplotlib.rcParams) == before
    assert "pyplot" not in Path(inspect.getfile(plot_losses)).read_text()


def test_the_loss_is_drawn_from_its_first_step_on(tmp_path):
    losses = plot_losses({"a": write_metrics(tmp_path / "a.csv")}, tmp_path / "a.png").axes[0]
    low, high = losses.get_ylim()
    drawn = [value for line in losses.lines for value in line.get_ydata()]
    assert low <= min(drawn) and 3.5 <= max(drawn) <= high


def test_the_halting_picture_tells_right_answers_from_wrong_ones(tmp_path):
    chances = [[0.9, 0.8], [0.7, 0.95], [0.1, 0.2], [0.05, 0.1]]
    (axes,) = plot_halting(chances, [True, True, False, False], tmp_path / "halting.png").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["answered right (2)", "answered wrong (2)"]
    medians = [
        line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2
    ]
    assert {0.8, 0.875} <= {round(float(value), 4) for value in medians}
    assert (tmp_path / "halting.png").read_bytes().startswith(PNG)
    plot_halting([[0.5]], [False], tmp_path / "halting.png")
    with pytest.raises(UserMistake, match="no halting head"):
        plot_halting([], [], tmp_path / "halting.png")


def test_the_reading_picture_has_a_column_a_word_and_takes_dollars_as_text(tmp_path):
    words, shares = ["He", "pays", "$5", "and", "$6."], [[0.1, 0.2, 0.4, 0.2, 0.1], [0.0, 0.0, 0.5, 0.0, 0.5]]
    together, each, _ = plot_attention(words, shares, tmp_path / "reading.png").axes
    assert [label.get_text() for label in each.get_xticklabels()] == words
    assert [bar.get_height() for bar in together.patches] == pytest.approx([5, 10, 45, 10, 30])
    assert each.images[0].get_array().tolist() == shares
    assert (tmp_path / "reading.png").read_bytes().startswith(PNG)

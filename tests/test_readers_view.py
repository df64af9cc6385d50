"""What a reader of a run sees: the comparison in words and as HTML, what latents read, bars, sample answers."""

import logging
import os
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from runs import DEV_ROWS, save_tiny_base, train_tiny
from test_compare import ARMS
from twins import ROWS, make_model, make_tokenizer

from smollm_trm import bars
from smollm_trm.evaluation.compare import compare_arms, comparison_html, verdict_in_words
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.halting import attention_by_word

TOKENIZER = make_tokenizer()


def test_the_verdict_is_a_sentence_with_its_interval_for_every_arm_but_the_controls():
    comparison = compare_arms(ARMS)
    sentences = verdict_in_words(comparison)
    compared = [arm for arm in comparison.arms if arm.against_baseline and "shuffled" not in arm.name]
    assert len(sentences) == len(compared) + sum(arm.against_shuffled is not None for arm in comparison.arms)
    for arm in compared:
        said = next(sentence for sentence in sentences if sentence.startswith(f"{arm.name} is"))
        better = "better than" if arm.against_baseline.difference > 0 else "worse than"
        assert (better if arm.against_baseline.p_value <= 0.05 else "neither better nor worse") in said
        assert f"{100 * arm.against_baseline.difference:+.1f} points [" in said
    told = " ".join(sentences)
    for words in ("the latents are used", "the latents are ignored", "too few problems to tell"):
        assert words in told


class Cells(HTMLParser):
    """The texts of a table's cells, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_table_as_html_holds_every_arm_and_names_are_text():
    comparison = compare_arms({**ARMS, "<b>evil": ARMS["LoRA"]})
    page = comparison_html(comparison, headline="quick & <dirty>")
    cells = Cells()
    cells.feed(page)
    assert not cells.open and "quick &amp; &lt;dirty&gt;" in page and "<b>evil" not in page
    assert [row[0] for row in cells.rows[1:]] == [arm.name for arm in comparison.arms]
    assert all(f"{100 * arm.accuracy:.1f}%" in row[2] for arm, row in zip(comparison.arms, cells.rows[1:], strict=True))


@pytest.mark.parametrize("reasoner", ["trm", "compressor"])
def test_the_words_that_latents_read_get_all_of_their_attention(reasoner):
    model = make_model("smollm3", TOKENIZER, reasoner=reasoner)
    question = ROWS[0]["question"]
    words, shares = attention_by_word(model, question)
    assert " ".join(words) == f"Question: {question} Answer: <think>"
    assert shares.shape == (6, len(words)) and torch.allclose(shares.sum(1), torch.ones(6), atol=1e-5)
    other = attention_by_word(model, ROWS[1]["question"])[1]
    assert other.shape != shares.shape or not torch.equal(other, shares)


def test_the_attention_that_is_shown_is_the_one_that_is_computed():
    compressor = make_model("smollm3", TOKENIZER, reasoner="compressor").reasoner.compressor
    states, mask = torch.randn(2, 7, compressor.to_key_value.in_features), torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    shares = compressor.attention(states, mask)
    assert torch.equal(shares[1, :, :3], torch.zeros(6, 3))
    compressor.n_heads = 1  # with one head, the mean over heads is what is attended
    value = compressor.to_key_value(states).chunk(2, -1)[1]
    content = compressor.out(compressor.attention(states, mask) @ value)
    content = content / content.square().mean(-1, keepdim=True).sqrt()
    whole = content + compressor.query_scale * compressor.queries
    expected = whole / whole.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(compressor(states, mask), expected, atol=1e-4)


def test_a_reasoner_that_reads_nothing_has_nothing_to_show():
    assert attention_by_word(make_model("smollm3", TOKENIZER, reasoner="static"), "How many?") is None


def test_in_a_notebook_a_bar_is_one_output_that_is_replaced(monkeypatch):
    shown = []
    output = SimpleNamespace(update=lambda data, raw: shown.append(("update", data["text/plain"])))

    def display(data, raw, display_id):
        shown.append(("new", data["text/plain"]))
        return output

    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    assert bars.is_watched()
    with bars.progress_bar(total=3, unit="problem", mininterval=0) as bar:
        for _ in range(3):
            bar.update()
        criterion = bars.KeepMoving(bar, at_most=20)
        criterion(torch.zeros(4, 9), None)
        count = len(shown)
        criterion.drawn -= 2
        stop = criterion(torch.zeros(4, 12), None)
        assert stop.tolist() == [False] * 4 and len(shown) == count + 1 and "token 4 of at most 20" in shown[-1][1]
    assert [kind for kind, _ in shown].count("new") == 1 and "3/3" in shown[-1][1]


def test_where_there_is_no_terminal_an_evaluation_writes_lines_also_within_its_first_batch(capsys, monkeypatch):
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0.0)
    evaluate_gsm8k(make_model("smollm3", TOKENIZER), ROWS[:4], batch_size=2, max_new_tokens=3)
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if "problem" in line]
    assert "\r" not in shown and re.search(r"^ *0% 0/4 \[.*token 1 of at most 3", lines[1]), shown
    assert "4/4 [" in lines[-1] and "% right" in lines[-1]


def test_a_terminal_without_a_width_still_shows_a_bar():
    reader, writer = os.openpty()
    with open(writer, "w") as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        bars.progress_bar(total=3, desc="training", dynamic_ncols=True).close()
    assert b"training" in os.read(reader, 1000)
    os.close(reader)


def test_sample_answers_of_the_averaged_weights_are_logged_at_every_validation(tmp_path, caplog):
    base = save_tiny_base(tmp_path / "base")
    options = {"num_epochs": 1, "val_check_interval": 2, "target": "answer"}
    with caplog.at_level(logging.INFO, logger="smollm_trm.training.watch"):
        train_tiny(base, tmp_path / "told", sample_answers=2, **options)
    told = [record.getMessage() for record in caplog.records if "right: " in record.getMessage()]
    assert [line.split()[1] for line in told] == ["1", "1", "2", "2", "3", "3"]
    assert DEV_ROWS[0]["question"][:60] in told[0] and DEV_ROWS[1]["question"][:60] in told[1]
    train_tiny(base, tmp_path / "silent", **options)
    weights = [(tmp_path / run / "model/model.safetensors").read_bytes() for run in ("told", "silent")]
    assert weights[0] == weights[1]

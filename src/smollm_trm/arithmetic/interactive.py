"""A conversation with a trained model: type a sum, see the chain step by step, see whether it is right."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smollm_trm.arithmetic.rules import THINK_CLOSED, column_steps, read_sum, write_answer
from smollm_trm.arithmetic.tokenizer import show_tokens

WORDS_THAT_END = ("quit", "exit")
PROMPT = "➤ Enter expression: "
SCREEN_COLOURS = {"dim": "\033[2m", "bold": "\033[1m", "right": "\033[32m", "wrong": "\033[31m", "think": "\033[36m"}


def check_expression(text: str, *, max_tokens: int) -> str:
    """The expression a user typed, without spaces, if the model can go on from it.

    Complete (`12+34=`) or begun (`7+`); digits, plus and one equals sign at the end.

    Args:
        text: as typed.
        max_tokens: tokens of the longest expression the context has room for.

    Raises:
        ValueError: what is wrong with it, and what to type instead.
    """
    expression = "".join(text.split())
    if not expression:
        raise ValueError("type a sum such as 12+34= (or quit)")
    if foreign := sorted(set(expression) - set("0123456789+=")):
        raise ValueError(f"only digits, + and = are known, not {' '.join(foreign)}: type a sum such as 12+34=")
    if "=" in expression[:-1]:
        raise ValueError("stop at the equals sign, the model writes what follows: type a sum such as 12+34=")
    numbers = expression.removesuffix("=").split("+")
    if not numbers[0] or "" in numbers[:-1] or (expression.endswith("=") and "" in numbers):
        raise ValueError("a number is missing beside a plus: type a sum such as 12+34=")
    if expression.endswith("=") and len(numbers) == 1:
        raise ValueError("one number is no sum: type two or more, such as 12+34=")
    if padded := [number for number in numbers if number != "0" and number.startswith("0")]:
        raise ValueError(f"write {int(padded[0])} instead of {padded[0]}: numbers have no leading zeros here")
    if len(expression) > max_tokens:
        raise ValueError(f"the expression has {len(expression)} tokens, but there is room for {max_tokens}: shorten it")
    return expression


@torch.inference_mode()
def complete_expression(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    expression: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.1,
) -> str:
    """Let the model go on from an expression, up to `<end>`.

    Args:
        model: the decoder.
        tokenizer: of the 16 tokens.
        expression: checked by `check_expression`.
        max_new_tokens: None for as many as the context holds.
        temperature: of sampling; 0 takes the most likely token always.
    """
    batch = tokenizer(expression, return_tensors="pt", return_token_type_ids=False).to(model.device)
    room = model.config.max_position_embeddings - batch["input_ids"].shape[1]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    row = model.generate(**batch, max_new_tokens=min(max_new_tokens or room, room), **sampling)[0]
    return show_tokens(tokenizer, row.tolist())


def describe_completion(
    expression: str, written: str, *, digit_order: str = "normal", coloured: bool = False
) -> list[str]:
    """What the screen shows for one completion, line by line.

    Args:
        expression: what the user typed.
        written: expression and completion.
        digit_order: of the model's answers.
        coloured: with terminal colours.
    """

    def paint(text: str, colour: str) -> str:
        return f"{SCREEN_COLOURS[colour]}{text}\033[0m" if coloured else text

    try:
        example = read_sum(written)
    except ValueError:
        cut = "" if written.endswith("<end>") else " (it was cut before <end>)"
        return [
            f"✨ Model completion: '{expression}' → '{written}'",
            paint(f"❌ This is no whole sum{cut}", "wrong"),
        ]
    problem = written[: written.index("=") + 1]
    if example.chain is None:
        lines = [f"✨ Model completion: '{expression}' → '{paint(written, 'bold')}'"]
    else:
        lines = [
            f"✨ Model output: {paint(written, 'bold')}",
            "🤔 Chain of thought:",
            f"  {problem}",
            "  🧮 Think:",
            *_describe_steps(example.chain.split(" "), column_steps(example.operands), paint),
            f"  {written.rpartition(THINK_CLOSED)[2]}",
        ]
    right_answer = write_answer(example.operands, digit_order=digit_order)
    if example.answer == right_answer:
        return [*lines, paint(f"✅ Answer: {problem}{example.answer}", "right")]
    return [*lines, paint(f"❌ Answer: {problem}{example.answer} (right: {right_answer})", "wrong")]


def _describe_steps(steps: list[str], right_steps: list[str], paint: object) -> Iterator[str]:
    for number, step in enumerate(steps):
        right = right_steps[number] if number < len(right_steps) else "nothing more"
        yield (paint(f"    {step}", "think") if step == right else paint(f"    {step}  ✗ (right: {right})", "wrong"))


def converse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.1,
    source: TextIO | None = None,
    screen: TextIO | None = None,
) -> None:
    """Read expressions and show completions until `quit`, `exit`, Ctrl-C, Ctrl-D or the end of a pipe.

    Args:
        model: the decoder.
        tokenizer: of the 16 tokens.
        max_new_tokens: None for as many as the context holds.
        temperature: of sampling.
        source: where expressions are read from, one a line; stdin by default.
        screen: where to write; stdout by default.
    """
    source, screen = source or sys.stdin, screen or sys.stdout
    coloured = screen.isatty() and "NO_COLOR" not in os.environ
    digit_order = getattr(model.config, "digit_order", "normal")
    longest = model.config.max_position_embeddings - 2  # room for a digit and <end>

    def show(*lines: str) -> None:
        screen.write("".join(f"{line}\n" for line in lines))
        screen.flush()

    with suppress(KeyboardInterrupt):
        for text in _typed_lines(source, screen):
            if text.strip().lower() in WORDS_THAT_END:
                break
            try:
                expression = check_expression(text, max_tokens=longest)
            except ValueError as error:
                show(f"⚠ {error}")
                continue
            show(f"💭 Generating completion for: {expression}")
            written = complete_expression(
                model, tokenizer, expression, max_new_tokens=max_new_tokens, temperature=temperature
            )
            show(*describe_completion(expression, written, digit_order=digit_order, coloured=coloured), "")
    show("Goodbye!")


def _typed_lines(source: TextIO, screen: TextIO) -> Iterator[str]:
    """Lines from a pipe as they are; from a person with a prompt, line editing and history (arrow up)."""
    if not (source is sys.stdin and source.isatty()):
        yield from source
        return
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  (importing it gives input() its history)
    screen.write("Type a sum such as 12+34= (quit, exit, Ctrl-C or Ctrl-D ends)\n")
    with suppress(EOFError):
        while True:
            yield input(PROMPT)

"""A conversation with a trained model: type a sum, see the chain step by step, see whether it is right."""

import os
import sys
from contextlib import suppress

from transformers import PreTrainedModel

from smollm_trm.arithmetic.evaluation import complete_sums
from smollm_trm.arithmetic.rules import END, THINK_CLOSED, column_steps, read_sum, write_answer
from smollm_trm.records import UserMistake

SCREEN_COLOURS = {"bold": "\033[1m", "right": "\033[32m", "wrong": "\033[31m", "think": "\033[36m"}


def check_expression(text: str, *, max_tokens: int) -> str:
    """The expression typed, complete (`12+34=`) or begun (`7+`), without spaces; a UserMistake says what to type."""
    expression = "".join(text.split())
    numbers = expression.removesuffix("=").split("+")
    whole = expression.endswith("=")
    padded = [number for number in numbers if number != "0" and number.startswith("0")]
    if not expression:
        raise UserMistake("type a sum such as 12+34= (or quit)")
    if foreign := sorted(set(expression) - set("0123456789+=")):
        raise UserMistake(f"only digits, + and = are known, not {' '.join(foreign)}: type a sum such as 12+34=")
    if "=" in expression[:-1]:
        raise UserMistake("stop at the equals sign, the model writes what follows: type a sum such as 12+34=")
    if "" in (numbers if whole else numbers[:-1]):
        raise UserMistake("a number is missing beside a plus: type a sum such as 12+34=")
    if whole and len(numbers) == 1:
        raise UserMistake("one number is no sum: type two or more, such as 12+34=")
    if padded:
        raise UserMistake(f"write {int(padded[0])} instead of {padded[0]}: numbers have no leading zeros here")
    if len(expression) > max_tokens:
        raise UserMistake(
            f"the expression has {len(expression)} tokens, but there is room for {max_tokens}: shorten it"
        )
    return expression


def describe_completion(
    expression: str, written: str, *, digit_order: str = "normal", coloured: bool = False
) -> list[str]:
    """What the screen shows, line by line, for what the user typed and what it became (`written`)."""

    def paint(text: str, colour: str) -> str:
        return f"{SCREEN_COLOURS[colour]}{text}\033[0m" if coloured else text

    try:
        example = read_sum(written)
    except UserMistake:
        cut = "" if written.endswith(END) else f" (it was cut before {END})"
        return [f"✨ Model completion: '{expression}' → '{written}'", paint(f"❌ This is no whole sum{cut}", "wrong")]
    problem = written[: written.index("=") + 1]
    if example.chain is None:
        lines = [f"✨ Model completion: '{expression}' → '{paint(written, 'bold')}'"]
    else:
        lines = [f"✨ Model output: {paint(written, 'bold')}", "🤔 Chain of thought:", f"  {problem}", "  🧮 Think:"]
        right_steps = column_steps(example.operands)
        for number, step in enumerate(example.chain.split(" ")):
            right = right_steps[number] if number < len(right_steps) else "nothing more"
            mark, colour = ("", "think") if step == right else (f"  ✗ (right: {right})", "wrong")
            lines.append(paint(f"    {step}{mark}", colour))
        lines.append(f"  {written.rpartition(THINK_CLOSED)[2]}")
    right_answer = write_answer(example.operands, digit_order=digit_order)
    if example.answer == right_answer:
        return [*lines, paint(f"✅ Answer: {problem}{example.answer}", "right")]
    return [*lines, paint(f"❌ Answer: {problem}{example.answer} (right: {right_answer})", "wrong")]


def converse(model: PreTrainedModel, *, max_new_tokens: int | None = None, temperature: float = 0.1) -> None:
    """Read expressions and show completions until `quit`, `exit`, Ctrl-C, Ctrl-D or the end of a pipe."""
    prompt = ""
    if sys.stdin.isatty():
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (importing it gives input() line editing and a history)
        print("Type a sum such as 12+34= (quit, exit, Ctrl-C or Ctrl-D ends)")
        prompt = "➤ Enter expression: "
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    context = model.config.max_position_embeddings
    with suppress(KeyboardInterrupt, EOFError):
        while (text := input(prompt)).strip().lower() not in ("quit", "exit"):
            try:
                expression = check_expression(text, max_tokens=context - 2)  # room for a digit and <end>
            except UserMistake as mistake:
                print(f"⚠ {mistake}")
                continue
            print(f"💭 Generating completion for: {expression}", flush=True)
            room = min(max_new_tokens or context, context - len(expression))
            [written] = complete_sums(model, [expression], batch_size=1, max_new_tokens=room, temperature=temperature)
            digit_order = getattr(model.config, "digit_order", "normal")
            lines = describe_completion(expression, written, digit_order=digit_order, coloured=coloured)
            print(*lines, "", sep="\n", flush=True)
    print("Goodbye!")

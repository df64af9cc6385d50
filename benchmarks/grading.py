"""Does our grading agree with the gold answers of GSM8K, OpenAI's official grades, and a table of odd forms?

    python benchmarks/grading.py [--data_dir ../shared/data/gsm8k] [--solutions example_model_solutions.jsonl]

Every row of GSM8K is graded against its own gold answer (right), in five forms, and against the next row's (as
OpenAI's grader says). `--solutions` takes the published model solutions of openai/grade-school-math with their
official grades; they end in `A: 18`, so they are graded as they are and with `A:` written as `####`.
"""

import json
import os
import re
import time
from pathlib import Path

from _record import benchmark_options, print_table, record

from smollm_trm.data.answers import extract_answer, extract_strict_answer, is_correct, strip_annotations

OPENAI_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
CHECKOUT = Path(__file__).parents[1]


def openai_answer(text: str) -> str | None:
    """What `extract_answer` of grade-school-math's dataset.py finds."""
    found = OPENAI_ANSWER.search(text)
    return found[1].replace(",", "") if found else None


def grade_gsm8k(answers: list[str]) -> dict[str, tuple[int, int]]:
    """Agreements and cases, per kind of text."""
    golds = [openai_answer(answer) for answer in answers]
    kinds = {
        "the solution itself, flexible": [is_correct(text, gold) for text, gold in zip(answers, golds, strict=True)],
        "the solution itself, strict": [
            is_correct(text, gold, strict=True) for text, gold in zip(answers, golds, strict=True)
        ],
        "without calculator annotations": [
            is_correct(strip_annotations(text), gold) for text, gold in zip(answers, golds, strict=True)
        ],
        "'The answer is $n.' in place of '#### n'": [
            is_correct(text.replace("#### ", "The answer is $") + ".", gold)
            for text, gold in zip(answers, golds, strict=True)
        ],
        "same number as OpenAI's regular expression": [
            extract_answer(text) == gold for text, gold in zip(answers, golds, strict=True)
        ],
        "the next problem's solution, OpenAI's grade": [
            is_correct(other, gold) == (openai_answer(other) == gold)
            for other, gold in zip(answers[1:] + answers[:1], golds, strict=True)
        ],
    }
    return {kind: (sum(agreed), len(agreed)) for kind, agreed in kinds.items()}


def grade_solutions(rows: list[dict]) -> dict[str, tuple[int, int]]:
    """Agreements with the official grades of published model solutions."""
    kinds: dict[str, list[bool]] = {"official grades, as published": [], "official grades, '####' for 'A:'": []}
    for row in rows:
        gold = row["ground_truth"].rsplit("A:", 1)[1].strip()
        for solution in (value for value in row.values() if isinstance(value, dict)):
            text, grade = solution["solution"], solution["is_correct"]
            with_mark = re.sub(r"(?m)^A: ", "#### ", text)
            first, second = kinds.values()
            first.append(is_correct(text, gold) == grade)
            second.append(is_correct(with_mark, gold, strict=True) == grade)
    return {kind: (sum(agreed), len(agreed)) for kind, agreed in kinds.items()}


def main() -> None:
    parser = benchmark_options(__doc__)
    default = os.environ.get("GSM8K_DIR", CHECKOUT.parent / "shared" / "data" / "gsm8k")
    parser.add_argument("--data_dir", type=Path, default=default, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--solutions", type=Path, help="example_model_solutions.jsonl of openai/grade-school-math")
    options = parser.parse_args()
    start, answers = time.perf_counter(), []
    for part in ("train", "test"):
        lines = (options.data_dir / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        answers += [json.loads(line)["answer"] for line in lines]
    agreements = grade_gsm8k(answers)
    chains_alone = sum(is_correct(answer.split("####")[0], openai_answer(answer)) for answer in answers)
    forms = json.loads((CHECKOUT / "tests" / "data" / "odd_answers.json").read_text())
    agreements["odd forms"] = (
        sum(
            (extract_answer(form["text"]), extract_strict_answer(form["text"])) == (form["flexible"], form["strict"])
            for form in forms
        ),
        len(forms),
    )
    if options.solutions:
        rows = [json.loads(line) for line in options.solutions.read_text(encoding="utf-8").splitlines()]
        agreements.update(grade_solutions(rows))
    rows = [[kind, agreed, cases, cases - agreed] for kind, (agreed, cases) in agreements.items()]
    print_table(["what", "agree", "of", "differ"], rows)
    print(f"(for comparison: {chains_alone} of {len(answers)} chains end in their answer even without '####')")
    figures = {kind: {"agree": agreed, "of": cases} for kind, (agreed, cases) in agreements.items()}
    figures["chains whose last number is the answer"] = {"agree": chains_alone, "of": len(answers)}
    record("grading", {**figures, "seconds": round(time.perf_counter() - start, 1)}, keep=options.record)


if __name__ == "__main__":
    main()

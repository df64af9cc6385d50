"""Reading the final answer of a solution, and grading it.

GSM8K ends every solution with `#### 72`. A model may end otherwise, so an answer is looked for in this order:

1. the number after the **first** `####` (a model that runs on after its answer must not overwrite it), or, in
   Coconut's form, a last line that is `### 72` and nothing else;
2. the number after the last "the answer is", "Answer:", "A:" or in the last `\\boxed{}`;
3. the last number of the text.

Only generated text is ever read. The *strict* score accepts rule 1 alone, the *flexible* score all three. Numbers are
compared exactly, by value: `18`, `18.00`, `$18`, `18.` and `36/2` are one answer. There alone we differ from OpenAI's
grader (regular expression `#### (\\-?[0-9\\.\\,]+)`, then equality of strings). Percent signs, currencies and units are
dropped: `20%` is 20, as in GSM8K. Scale words ("2 million") and numbers in words are not read.

Own data may have answers in words (`#### Paris`): what stands behind `####`, after "the answer is", or in the last line
is compared in lower case, without punctuation and articles. A gold answer that begins with a digit is a number.

Source of the format and of the reference grader: github.com/openai/grade-school-math, `dataset.py`.
"""

import re
import unicodedata
from fractions import Fraction

from smollm_trm.records import UserMistake

_ANNOTATION = re.compile(r"<<[^<>\n]*>>")
_CUT_OFF_ANNOTATION = re.compile(r"<<[^<>\n]*\Z")
_NEXT_PROBLEM = re.compile(r"\n[ \t]*(?:Question|Problem|Q)[ \t]*:")
_ANSWER_MARK = re.compile(r"(?i:\banswer\s+(?:is|was|=)|\banswer\s*:|\\boxed\s*\{)|(?m:^[ \t]*A[ \t]*:)")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z)|\n")
_GROUPING_SPACE = re.compile("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3}(?![0-9]))")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([0-9]+)\}\s*\{([0-9]+)\}")
_VULGAR_FRACTIONS = {
    one: unicodedata.normalize("NFKC", one).replace("\u2044", "/")
    for one in map(chr, (*range(188, 191), *range(8528, 8543)))
}
_VULGAR_FRACTION = re.compile(f"[{''.join(_VULGAR_FRACTIONS)}]")
_DIGIT = re.compile("[0-9]")
_SPOKEN_MINUS = re.compile(r"\A(\s*[-+])\s+(?=[$€£¥₹]?[0-9.])")
_NUMBER_TOKEN = re.compile(
    r"(?:(?<![\w)\]%.])(?P<sign>[-+]?(?:[$€£¥₹]\s?[-+]?)?))?"  # -5, $5, -$5, $-5; but 10-5 ends in 5
    r"(?<![0-9])(?:(?P<whole>[0-9]++) (?=[0-9]+/[1-9]))?"  # the 2 of 2 1/2
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,2}(?!\w))?"
    r"(?:/(?P<below>[0-9]++)(?!/|\.[0-9]))?"
)
_COCONUT_END = re.compile(rf"^###[ ](?=\S)(?:{_NUMBER_TOKEN.pattern})\s*\Z", re.MULTILINE)  # a last line "### 5"
_TYPOGRAPHY = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u2044": "/"})
_ARTICLES = ("a", "an", "the")
_REACH_OF_A_MARK = 400  # characters within which "the answer is" must give its number
_LONGEST_FRACTION_PART = 30  # digits; a fraction with longer parts is a runaway, not an answer
_MOST_MARKS = 100  # of a kind that are looked at; a text with more is a runaway


def strip_annotations(text: str) -> str:
    """Remove GSM8K's calculator annotations: `48/2 = <<48/2=24>>24` becomes `48/2 = 24`."""
    return _ANNOTATION.sub("", text)


def annotations_in(text: str) -> list[str]:
    """GSM8K's calculator annotations, such as `<<48/2=24>>`, in their order."""
    return _ANNOTATION.findall(text)


def gold_answer(answer: str) -> str:
    """The final answer of a GSM8K solution (`... #### 1,234`) as a normalised number (`1234`)."""
    gold = answer_in_words(answer) or extract_strict_answer(answer)
    if gold is None:
        raise UserMistake(f"the answer {answer[-60:]!r} has no final '#### <number>'; add one, as in GSM8K")
    return gold


def answer_in_words(answer: str) -> str | None:
    """The final answer of a gold solution where that is words (`... #### Paris`), None where it is a number or none."""
    final = " ".join(answer.rpartition("####")[2].split()) if "####" in answer else ""
    return final if next((one for one in final if one.isalnum() or one == "\\"), "").isalpha() else None


def answer_like(gold: str, text: str, *, strict: bool = False) -> str | None:
    """The final answer of a generated text in the form that a gold solution's has: a number, or normalised words."""
    if answer_in_words(gold) is None:
        return extract_strict_answer(text) if strict else extract_answer(text)
    said = _NEXT_PROBLEM.split(text.strip(), maxsplit=1)[0]
    if "####" in said:
        said = said.split("####", 1)[1].strip().split("\n", 1)[0]
    elif strict:
        return None
    elif marks := list(_ANSWER_MARK.finditer(said)):
        said = _SENTENCE_END.split(said[marks[-1].end() :].lstrip(": {\n"), maxsplit=1)[0]
    else:
        said = said.rpartition("\n")[2]
    return " ".join(word for word in re.findall(r"\w+", said.casefold()) if word not in _ARTICLES) or None


def extract_strict_answer(text: str) -> str | None:
    """The normalised number after the first `####` that has one, or None."""
    return _number_after_hashes(_tidied(text))


def extract_answer(text: str) -> str | None:
    """The final answer of a generated text as a normalised number (`-1234.5`, `1/3`), or None if it has none."""
    text = _tidied(text)
    if not _DIGIT.search(text):
        return None
    return _number_after_hashes(text) or _number_after_mark(text) or _last_number(text)


def is_correct(text: str, gold: str, *, strict: bool = False) -> bool:
    """Whether the final answer of `text` has the value of `gold`, by the flexible score or the strict one."""
    gold = str(gold)
    if "####" not in gold:
        gold = f"#### {extract_answer(gold) or gold}"
    expected = answer_like(gold, gold)
    if expected is None:
        raise UserMistake(f"the gold answer {gold[-60:]!r} is none; give 'n' or '#### n'")
    return answer_like(gold, text, strict=strict) == expected


def _tidied(text: str) -> str:
    """One spelling for minus signs, fractions and LaTeX; no annotations; nothing after a next question."""
    text = _CUT_OFF_ANNOTATION.sub("", strip_annotations(text))
    text = text.translate(_TYPOGRAPHY).replace("**", " ").strip()
    next_problem = _NEXT_PROBLEM.search(text)
    if next_problem and re.search("[0-9]", text[: next_problem.start()]):
        text = text[: next_problem.start()]
    if "\\" in text or "{" in text:
        for latex, plain in (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\,", ""), ("\\!", "")):
            text = text.replace(latex, plain)
        text = _LATEX_FRACTION.sub(_fraction_on_one_line, text)
    return _VULGAR_FRACTION.sub(_fraction_on_one_line, _GROUPING_SPACE.sub("", text))


def _fraction_on_one_line(match: re.Match) -> str:
    """`\\frac{1}{2}` or a half as a single character becomes `1/2`, with a space after a whole number."""
    spelled = "/".join(match.groups()) or _VULGAR_FRACTIONS[match.group()]
    return " " + spelled if match.string[max(0, match.start() - 1) : match.start()].isdigit() else spelled


def _number_after_hashes(text: str) -> str | None:
    """The first number on the line of the first `####` that has one (if empty, on the next line)."""
    for tail in text.split("####", _MOST_MARKS)[1:]:
        line = _SPOKEN_MINUS.sub(r"\1", tail.strip().split("\n", 1)[0])
        if numbers := _numbers_in(re.sub(r"(?<=[0-9]),(?=[0-9])", "", line)):  # any grouping goes
            return numbers[0]
    as_coconut_ends = _COCONUT_END.search(text)
    return _normalised(as_coconut_ends) if as_coconut_ends else None


def _number_after_mark(text: str) -> str | None:
    """The number that the last "the answer is", "Answer:" or `\\boxed{` gives; others are skipped."""
    for mark in reversed(list(_ANSWER_MARK.finditer(text))[-_MOST_MARKS:]):
        tail = text[mark.end() : mark.end() + _REACH_OF_A_MARK]
        if not _DIGIT.search(tail):
            continue
        if mark.group().endswith(":"):  # "Answer: he has 5 apples, so" opens a chain, announces nothing
            blanks = re.match(r"[^\w\n]*", tail).group()
            number = _NUMBER_TOKEN.match(tail, len(blanks.rstrip("+-$€£¥₹.")))  # from its sign on
            if number and (value := _normalised(number)) is not None:
                return value
            continue
        clause = _SENTENCE_END.split(tail.lstrip(": \n"), maxsplit=1)[0]
        if mark.group().endswith("{"):
            clause = clause.split("}", 1)[0]
        if numbers := _numbers_in(clause.rpartition("=")[2]) or _numbers_in(clause):
            return numbers[0]
    return None


def _last_number(text: str) -> str | None:
    """The last number of the text, looked for from its end: in a window that grows until it holds one."""
    begins, size = len(text), 1000
    while begins:
        begins, size = _outside_a_number(text, len(text) - size), 4 * size
        if matches := list(_NUMBER_TOKEN.finditer(text, begins)):
            return next((value for one in reversed(matches) if (value := _normalised(one)) is not None), None)
    return None


def _outside_a_number(text: str, at: int) -> int:
    """A place at or before `at` that no number spans: a blank, else anything but a digit, else the beginning."""
    for is_outside in (str.isspace, lambda one: not one.isdigit()):
        for place in range(at, max(0, at - 1000), -1):
            if is_outside(text[place]):
                return place
    return 0


def _numbers_in(text: str) -> list[str]:
    """All numbers of the text, normalised, in their order."""
    return [value for match in _NUMBER_TOKEN.finditer(text) if (value := _normalised(match)) is not None]


def _normalised(match: re.Match) -> str | None:
    """The one spelling of a number's value: no idle zeros, fractions as decimals where these end."""
    digits = match["digits"].replace(",", "")  # a runaway generation writes numbers too long for Python's integers
    negative = "-" in (match["sign"] or "")
    if match["below"] or match["exponent"]:
        parts = (digits, match["whole"] or "", match["below"] or "")
        if max(map(len, parts)) > _LONGEST_FRACTION_PART or (match["below"] and int(match["below"]) == 0):
            return None
        value = Fraction(digits + (match["exponent"] or "")) / int(match["below"] or 1)
        value += int(match["whole"] or 0)
        places = value.denominator.bit_length()  # 2**k * 5**l divides 10**max(k, l), and max(k, l) < bit length
        if 10**places % value.denominator:
            spelled = f"{'-' if negative else ''}{value.numerator}/{value.denominator}"
            longest = max(abs(value.numerator), value.denominator)
            return spelled if longest < 10**_LONGEST_FRACTION_PART else None
        digits = str(value.numerator * 10**places // value.denominator).rjust(places + 1, "0")
        digits = f"{digits[:-places]}.{digits[-places:]}"
    integer, _, decimals = digits.partition(".")
    integer, decimals = integer.lstrip("0") or "0", decimals.rstrip("0")
    unsigned = f"{integer}.{decimals}" if decimals else integer
    return "-" + unsigned if negative and unsigned != "0" else unsigned

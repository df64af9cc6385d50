"""The word problems are right, readable, endless, and cannot be solved by guessing."""

import dataclasses
import functools
import os
import random
import re
from collections import Counter

import pytest

from smollm_trm.data.answers import gold_answer, strip_annotations
from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.rows import normalize_question
from smollm_trm.data.word_problems import WordProblemSettings, generate_word_problems, write_word_problems
from smollm_trm.records import UserMistake

SMALL = WordProblemSettings(max_number=10, max_value=50)
HARD = WordProblemSettings(max_steps=6, max_number=50, max_value=1000, distractor_rate=0.6)
every_difficulty = pytest.mark.parametrize(
    "settings", [SMALL, WordProblemSettings(), HARD], ids=["small", "default", "hard"]
)


@functools.cache
def problems(settings):
    return generate_word_problems(count=1500, seed=3, settings=settings)


@pytest.fixture
def rows():
    return problems(WordProblemSettings())


def steps_of(row):
    found = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", row["answer"])
    return [(int(left), sign, int(right), int(result)) for left, sign, right, result in found]


def numbers_in(text):
    return [int(number) for number in re.findall(r"\d+", text)]


class Reader:
    """Solves a problem from its text alone, sentence by sentence; shares nothing with the generator."""

    def solve(self, question):
        self.has, self.crowd, self.each, self.packed, self.goal = {}, 0, 0, "", 0
        self.subject, self.answer = "", None
        text = re.sub(r"\b(has to make|rides|reads)\b", "has", question)
        text = re.sub(r"\b(have to make|ride|read)\b", "have", text).replace("twice as", "2 times as")
        for sentence in re.findall(r"[^.?]+[.?]", text):
            self.read(sentence.strip())
        return self.answer

    def read(self, sentence):
        for pattern, effect in READINGS:
            if found := re.fullmatch(pattern, sentence):
                words = [self.subject if word.lower() in ("he", "she") else word for word in found.groups()]
                self.subject = next((word for word in words if word.istitle()), self.subject)
                effect(self, *[int(word) if word.isdigit() else word for word in words])
                return
        raise AssertionError(f"cannot read: {sentence}")

    def set(self, name, things, amount):
        self.has[name, things] = amount

    def add(self, name, things, change):
        self.has[name, things] += change

    def times(self, name, things, number):
        self.has[name, things] *= number

    def halve(self, name, things):
        self.has[name, things] //= 2

    def halve_work(self, name):
        for owner, things in self.has:
            if owner == name and things in ("chairs", "lamps", "shirts", "kites", "clocks"):
                self.halve(owner, things)

    def compare(self, first, second, things, forwards, backwards):
        """One is known: the first is `forwards` of the second, the second `backwards` of the first."""
        if (second, things) in self.has:
            self.set(first, things, forwards(self.has[second, things]))
        else:
            self.set(second, things, backwards(self.has[first, things]))

    def differ(self, first, second, things, more):
        self.compare(first, second, things, lambda amount: amount + more, lambda amount: amount - more)

    def pack(self, name, things, bags):
        self.each, self.packed = self.has[name, things] // bags, things

    def fill(self, change):
        self.each += change

    def gather(self, crowd):
        self.crowd = crowd

    def aim(self, goal):
        self.goal = goal

    def find(self, answer):
        self.answer = answer


NAME, NUMBER, WORD = r"([A-Z][a-z]+|he|she)", r"(\d+)", r"([a-z]+)"
READINGS = [
    # what does not matter
    (r"It is a warm day in May\.|The sun is shining\.", lambda s: None),
    (rf"On Saturday {NAME} is at home\.", lambda s, a: None),
    (rf"{NAME} (?:goes to school with|and) {NAME}(?: are good friends| live in a small town)?\.",
     lambda s, a, b: None),
    (rf"{NAME} (?:is|lives) {NUMBER} (?:years old|miles away)\.", lambda s, a, n: None),
    # how it begins
    (rf"{NAME} (?:also )?(?:has|starts the day with|takes) {NUMBER} {WORD}"
     r"(?: to the market| on a bike in the morning| on Monday)?\.", lambda s, a, n, o: s.set(a, o, n)),
    (rf"There are {NUMBER} {WORD} on the table of {NAME}\.", lambda s, n, o, a: s.set(a, o, n)),
    (rf"{NAME} has {NUMBER} \w+ with {NUMBER} {WORD} in each \w+\.",
     lambda s, a, k, n, o: s.set(a, o, k * n)),
    (rf"{NAME} (?:gets|has|saves) {NUMBER} {WORD} (?:every|an) \w+ for {NUMBER} \w+s(?: on a bike)?\.",
     lambda s, a, n, o, k: s.set(a, o, n * k)),
    (rf"{NAME} works {NUMBER} hours and earns {NUMBER} {WORD} an hour\.",
     lambda s, a, k, n, o: s.set(a, o, n * k)),
    (rf"{NAME} has {NUMBER} {WORD} for each of {NUMBER} shops\.", lambda s, a, n, o, k: s.set(a, o, n * k)),
    (rf"{NAME} has {NUMBER} {WORD} (?:at home|to school|on Monday|for a school) and {NUMBER}(?: \w+)? "
     r"(?:at school|in a bag|in the park|on Friday|for a shop)\.", lambda s, a, n, o, k: s.set(a, o, n + k)),
    # comparisons
    (rf"{NAME} has {NUMBER} more {WORD} than {NAME}\.", lambda s, a, n, o, b: s.differ(a, b, o, n)),
    (rf"{NAME} has {NUMBER} fewer {WORD} than {NAME}\.", lambda s, a, n, o, b: s.differ(a, b, o, -n)),
    (rf"{NAME} has half as many {WORD} as {NAME}\.", lambda s, b, o, a: s.set(b, o, s.has[a, o] // 2)),
    (rf"{NAME} has {NUMBER} times as many {WORD} as {NAME}\.",
     lambda s, a, n, o, b: s.compare(a, b, o, lambda amount: amount * n, lambda amount: amount // n)),
    # more and less
    (rf"Then {NAME} gives {NAME} {NUMBER} more {WORD}\.", lambda s, b, a, n, o: s.add(a, o, n)),
    (rf"Then {NAME} gives {NUMBER} {WORD} to {NAME}\.", lambda s, a, n, o, b: s.add(a, o, -n)),
    (rf"{NAME} gives half of the {WORD} to {NAME}\.", lambda s, a, o, b: s.halve(a, o)),
    (rf"{NAME} (?:buys|finds) {NUMBER} more {WORD} in a (?:shop|drawer)\.",
     lambda s, a, n, o: s.add(a, o, n)),
    (rf"(?:Later|Then) {NAME} (?:gets|earns) {NUMBER}(?: more)? {WORD}(?: as a gift)?\.",
     lambda s, a, n, o: s.add(a, o, n)),
    (rf"(?:On Monday )?{NAME} (?:sells|loses|eats|drops|makes) {NUMBER} of the {WORD}(?: on the way)?\.",
     lambda s, a, n, o: s.add(a, o, -n)),
    (rf"{NAME} (?:spends|pays) {NUMBER} {WORD} (?:on a book|for lunch)\.",
     lambda s, a, n, o: s.add(a, o, -n)),
    (rf"{NAME} buys {NUMBER} \w+ for {NUMBER} {WORD} each\.", lambda s, a, k, n, o: s.add(a, o, -k * n)),
    (rf"(?:After lunch|In the evening) {NAME} has another {NUMBER} {WORD}\.",
     lambda s, a, n, o: s.add(a, o, n)),
    (rf"Then a friend asks {NAME} for {NUMBER} more {WORD}\.", lambda s, a, n, o: s.add(a, o, n)),
    (rf"{NAME} plays a game and wins until there are {NUMBER} times as many {WORD} as before\.",
     lambda s, a, n, o: s.times(a, o, n)),
    (rf"{NAME} does half of the work for {NAME}\.", lambda s, b, a: s.halve_work(a)),
    (rf"{NAME} sells all the {WORD} for {NUMBER} {WORD} each\.",
     lambda s, a, o, n, money: s.set(a, money, s.has[a, o] * n)),
    (rf"{NAME} spends all the money on {WORD} for {NUMBER} {WORD} each\.",
     lambda s, a, o, n, money: s.set(a, o, s.has[a, money] // n)),
    # bags
    (rf"{NAME} puts the {WORD} equally into {NUMBER} \w+\.", lambda s, a, o, n: s.pack(a, o, n)),
    (rf"Then {NAME} puts {NUMBER} more \w+ into each \w+\.", lambda s, a, n: s.fill(n)),
    (rf"Then {NAME} takes {NUMBER} \w+ out of each \w+\.", lambda s, a, n: s.fill(-n)),
    (rf"{NAME} fills {NUMBER} more \w+ in the same way for {NAME}\.",
     lambda s, a, n, b: s.set(b, s.packed, s.each * n)),
    # crowds
    (rf"There are {NUMBER} \w+ in the \w+\.", lambda s, n: s.gather(n)),
    (rf"There are {NUMBER} groups of {NUMBER} \w+ in the \w+\.", lambda s, k, n: s.gather(n * k)),
    (rf"First {NUMBER} \w+ come, then {NUMBER} \w+ come, and now they are in the \w+\.",
     lambda s, n, k: s.gather(n + k)),
    (rf"Then {NUMBER} more \w+ come\.", lambda s, n: s.gather(s.crowd + n)),
    (rf"Then {NUMBER} of the \w+ leave\.", lambda s, n: s.gather(s.crowd - n)),
    (rf"An hour later there are {NUMBER} times as many \w+\.", lambda s, n: s.gather(s.crowd * n)),
    (r"Then half of the \w+ leave\.", lambda s: s.gather(s.crowd // 2)),
    (rf"The \w+ make groups of {NUMBER}\.", lambda s, n: s.gather(s.crowd // n)),
    (rf"There is room for {NUMBER} \w+ in all\.", lambda s, n: s.gather(n - s.crowd)),
    # the question, or the sentence that prepares it
    (rf"{NAME} shares the {WORD} equally among {NUMBER} friends\.",
     lambda s, a, o, n: s.find(s.has[a, o] // n)),
    (rf"{NAME} (?:eats|makes) {NUMBER} {WORD} (?:every day|an hour)\.",
     lambda s, a, n, o: s.find(s.has[a, o] // n)),
    (rf"{NAME} wants to have {NUMBER} {WORD}\.", lambda s, a, n, o: s.find(n - s.has[a, o])),
    (rf"(?:A bike costs|The whole way is|The book has) {NUMBER} \w+(?: long)?\.", lambda s, n: s.aim(n)),
    (rf"How many more {WORD} does {NAME} need to buy it\?", lambda s, o, a: s.find(s.goal - s.has[a, o])),
    (rf"How many {WORD} are left for {NAME}\?", lambda s, o, a: s.find(s.goal - s.has[a, o])),
    (r"How many \w+ (?:does each friend get|do the \w+ last|does \w+ need)\?", lambda s: None),
    (r"How many more \w+ does \w+ need\?", lambda s: None),
    (r"How many \w+ are in each \w+\?", lambda s: s.find(s.each)),
    (r"How many (?:\w+ are in the \w+ now|groups are there|more \w+ can come)\?", lambda s: s.find(s.crowd)),
    (rf"How many {WORD} does {NAME} have (?:now|in all)\?", lambda s, o, a: s.find(s.has[a, o])),
    (rf"How many {WORD} do {NAME} and {NAME} have together\?",
     lambda s, o, a, b: s.find(s.has[a, o] + s.has[b, o])),
    (rf"How many more {WORD} does {NAME} have than {NAME}\?",
     lambda s, o, a, b: s.find(s.has[a, o] - s.has[b, o])),
]  # fmt: skip


@every_difficulty
def test_a_reader_of_the_text_alone_finds_the_gold_answer(settings):
    for row in problems(settings):
        assert Reader().solve(row["question"]) == int(gold_answer(row["answer"])), row


@every_difficulty
def test_every_annotation_is_right_and_the_last_one_is_the_gold_answer(settings):
    for row in problems(settings):
        steps = steps_of(row)
        for left, sign, right, result in steps:
            by_sign = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}
            assert by_sign[sign] == result
        assert str(steps[-1][-1]) == gold_answer(row["answer"])
        *chain, final = row["answer"].split("\n")
        assert len(chain) == len(steps)
        assert all(re.fullmatch(r"[A-Z][^<]*\d=<<[^<]*=(\d+)>>\1[^<]*\.", line) for line in chain)
        assert re.fullmatch(r"#### \d+", final)
        assert "<<" not in strip_annotations(row["answer"])


@every_difficulty
def test_every_step_takes_up_what_the_question_or_an_earlier_step_says(settings):
    for row in problems(settings):
        known = {*numbers_in(row["question"]), 2}  # half and twice are words
        steps = steps_of(row)
        for left, _, right, result in steps:
            assert {left, right} <= known, row
            known.add(result)
        for (*_, result), *following in (steps[at:] for at in range(len(steps) - 1)):
            assert any(result in (left, right) for left, _, right, _ in following), row


@every_difficulty
def test_quantities_are_whole_at_least_two_and_within_the_limits(settings):
    for row in problems(settings):
        steps = steps_of(row)
        assert settings.min_steps <= len(steps) <= settings.max_steps
        assert all(2 <= result <= settings.max_value for *_, result in steps), row
        assert all(2 <= number <= settings.max_value for number in numbers_in(row["question"])), row


def test_every_number_of_steps_and_every_operation_is_common(rows):
    lengths = Counter(len(steps_of(row)) for row in rows)
    signs = Counter(sign for row in rows for _, sign, _, _ in steps_of(row))
    assert min(lengths[n] for n in (1, 2, 3)) > 0.3 * len(rows)
    assert min(signs[sign] for sign in "+-*/") > 0.15 * signs.total()


def test_the_answer_is_rarely_a_number_of_the_question(rows):
    copied = sum(int(gold_answer(row["answer"])) in numbers_in(row["question"]) for row in rows)
    assert copied < 0.08 * len(rows)


def test_no_fixed_recipe_on_the_numbers_finds_many_answers(rows):
    recipes = {
        "sum of all": sum,
        "largest": max,
        "last": lambda n: n[-1],
        **{
            f"{name} of {first} and {second}": lambda n, apply=apply, i=first, j=second: apply(n[i], n[j])
            for name, apply in {
                "sum": lambda a, b: a + b,
                "difference": lambda a, b: abs(a - b),
                "product": lambda a, b: a * b,
                "quotient": lambda a, b: max(a, b) / min(a, b),
            }.items()
            for first, second in ((0, 1), (0, -1), (-2, -1))
        },
    }
    several = [(numbers_in(row["question"]), int(gold_answer(row["answer"]))) for row in rows]
    several = [(numbers, gold) for numbers, gold in several if len(numbers) > 1]
    for name, recipe in recipes.items():
        hits = sum(recipe(numbers) == gold for numbers, gold in several)
        assert hits < 0.15 * len(rows), name


def test_no_answer_is_so_common_that_it_pays_to_guess_it(rows):
    assert Counter(gold_answer(row["answer"]) for row in rows).most_common(1)[0][1] < 0.06 * len(rows)


def test_distractors_are_numbers_that_no_step_uses():
    def unused(row):
        used = {number for left, _, right, _ in steps_of(row) for number in (left, right)}
        return set(numbers_in(row["question"])) - used

    without, always = (
        generate_word_problems(count=500, seed=5, settings=WordProblemSettings(distractor_rate=rate))
        for rate in (0.0, 1.0)
    )
    assert not any(unused(row) for row in without)
    assert sum(bool(unused(row)) for row in always) > 400  # the others coincide with a number that matters


def test_the_vocabulary_is_small_and_the_spacing_regular(rows):
    words = {word for row in rows for word in re.findall(r"[A-Za-z]+", row["question"] + row["answer"])}
    assert len(words) < 300
    for question in (row["question"] for row in rows):
        assert re.fullmatch(r"[A-Z][A-Za-z0-9,]*(?: [A-Za-z0-9,]+[.?]?)*\?", question), question
        assert 10 <= len(question.split()) <= 80


def test_same_seed_same_problems_and_a_longer_list_begins_with_the_shorter():
    state = random.getstate()
    twenty = generate_word_problems(count=20, seed=7)
    assert random.getstate() == state
    random.seed(0)
    assert generate_word_problems(count=40, seed=7)[:20] == twenty
    assert generate_word_problems(count=20, seed=8) != twenty


def test_no_question_comes_twice(rows):
    assert len({normalize_question(row["question"]) for row in rows}) == len(rows)


def test_more_problems_than_there_are_is_refused_instead_of_searched_forever(monkeypatch):
    monkeypatch.setattr("smollm_trm.data.word_problems.normalize_question", lambda text: text[:1])
    with pytest.raises(UserMistake, match="count 30: only .* different problems were found"):
        generate_word_problems(count=30, seed=0)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(WordProblemSettings)])
def test_every_setting_changes_the_problems(field):
    others = {"min_steps": 3, "max_steps": 5, "max_number": 30, "max_value": 200, "distractor_rate": 0.9}
    settings = WordProblemSettings(**{field: others[field]})
    changed = generate_word_problems(count=50, seed=0, settings=settings)
    assert changed != generate_word_problems(count=50, seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_steps": 0}, "min_steps=0: must be at least 1"),
        ({"min_steps": 4}, "min_steps 4, max_steps 3"),
        ({"max_steps": 99}, "max_steps=99: must be at most 8"),
        ({"max_number": 5}, "max_number=5: must be at least 10"),
        ({"max_value": 40}, "max_value=40: must be at least 60"),
        ({"distractor_rate": 1.5}, "distractor_rate=1.5: must be at most 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(UserMistake, match=message):
        WordProblemSettings(**settings)


def test_a_count_below_one_is_refused(tmp_path):
    with pytest.raises(UserMistake, match="count=0: must be at least 1"):
        generate_word_problems(count=0, seed=0)
    with pytest.raises(UserMistake, match="test=0: must be at least 1"):
        write_word_problems(tmp_path, train=10, test=0, seed=0)
    assert not list(tmp_path.iterdir())


def test_written_files_load_as_gsm8k_with_nothing_in_two_parts(tmp_path):
    folder = write_word_problems(tmp_path / "new" / "folder", train=200, test=50, seed=0)
    splits = load_gsm8k(folder)
    assert (len(splits.gsm8k_train), len(splits.gsm8k_test), len(splits.gsm8k_final_test)) == (160, 40, 50)
    assert splits.duplicates == 0


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_word_problems(tmp_path, train=20, test=5, seed=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_word_problems(tmp_path, train=20, test=5, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

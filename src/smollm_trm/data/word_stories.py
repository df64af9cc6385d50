"""One word problem in the making: who has how much of what, what was said, what was computed.

The story keeps its steps as numbers and operators beside the text, so that chain and answer come from the same
arithmetic and every quantity can be checked while the story grows.
"""

import operator
import random
from dataclasses import dataclass, field

from smollm_trm.data.word_grammar import STORY_CONTAINERS, STORY_DISTRACTORS, STORY_PRONOUNS, STORY_TOPICS, StoryPhrase
from smollm_trm.records import UserMistake, check_range, picked

STEP_ARITHMETIC = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class WordProblemSettings:
    """How hard the problems are."""

    min_steps: int = 1  # fewest operations in a problem
    max_steps: int = 3  # most operations in a problem; their number is drawn evenly
    max_number: int = 20  # largest number added or taken away (starts go up to twice as much, factors up to 9)
    max_value: int = 100  # largest result, final or on the way, and largest goal in a question
    distractor_rate: float = 0.3  # share of problems with a number that does not matter

    def __post_init__(self) -> None:
        check_range(1, 8, **picked(self, "min_steps", "max_steps"))
        if self.min_steps > self.max_steps:
            raise UserMistake(f"min_steps {self.min_steps}, max_steps {self.max_steps}: need min <= max.")
        check_range(10, max_number=self.max_number)
        check_range(3 * self.max_number, max_value=self.max_value)
        check_range(0, 1, distractor_rate=self.distractor_rate)


@dataclass(frozen=True)
class WordStep:
    """One operation of a chain and the sentence around it."""

    left: int
    operator: str
    right: int
    line: str  # the sentence, with {c} where the calculation stands

    @property
    def result(self) -> int:
        return STEP_ARITHMETIC[self.operator](self.left, self.right)

    def written(self) -> str:
        """The line as GSM8K writes it, with its calculator annotation."""
        expression = f"{self.left}{self.operator}{self.right}"
        return self.line.format(c=f"{expression}=<<{expression}={self.result}>>{self.result}")


@dataclass(kw_only=True)
class WordStory:
    """A story that grows sentence by sentence; `value` is the quantity it follows."""

    rng: random.Random
    settings: WordProblemSettings
    topic: str
    owner: str
    unused_names: list[str]
    words: dict[str, str]  # what stands for {o}, {at}, {b}, {bag} and {x}
    value: int = 0
    sentences: list[str] = field(default_factory=list)
    steps: list[WordStep] = field(default_factory=list)
    told: list[StoryPhrase] = field(default_factory=list)
    earlier_values: set[int] = field(default_factory=set)
    spoken_of: str = ""  # the person whom a pronoun would mean, where that is clear
    before: tuple[str, int] | None = None  # the owner before this one, with that quantity of the same things
    asked: bool = False

    def tell(self, text: str, **numbers: int | str) -> None:
        """Add text to the question; a newly named {Q} is used up."""
        topic = STORY_TOPICS[self.topic]
        pronoun_is_clear = self.spoken_of == self.owner and self.rng.random() < 0.6
        spoken_of = STORY_PRONOUNS[self.owner] if pronoun_is_clear else self.owner
        names = {"N": self.owner, "P": spoken_of, "Q": self.unused_names[-1]}
        if "{x}" in text:
            nouns = STORY_TOPICS["collection"].things + STORY_TOPICS["food"].things
            self.words["x"] = self.rng.choice([noun for noun in nouns if noun != self.words["o"]])
        filled = text.format(**names, has=topic.has, have=topic.have, **self.words, **numbers)
        self.sentences.append(filled[0].upper() + filled[1:])
        if "{Q}" in text:
            self.unused_names.pop()
            self.spoken_of = ""
        elif "{N}" in text or "{P}" in text:
            self.spoken_of = self.owner

    def add_step(self, left: int, operator: str, right: int, line: str, *, other: str = "") -> None:
        """Write one line of the chain; its result is the new quantity."""
        names = {"N": self.owner, "Q": other, "c": "{c}", "has": STORY_TOPICS[self.topic].has}
        self.steps.append(WordStep(left, operator, right, line.format(**names, **self.words)))
        self.earlier_values |= {left, right}
        self.value = self.steps[-1].result

    def fits(self, value: int) -> bool:
        """Whether a quantity is sensible here and was not there before (no walking in circles)."""
        return 2 <= value <= self.settings.max_value and value not in self.earlier_values

    def fitting_operands(self, phrase: StoryPhrase) -> list[int]:
        """All numbers with which the phrase gives a whole and sensible result."""
        value, largest = self.value, self.settings.max_number
        if phrase.operator == "goal":
            goals = range(value + 2, min(self.settings.max_value, value + 2 * largest) + 1)
            return [goal for goal in goals if self.fits(goal - value)]
        ranges = {"factor": range(2, 10), "times": range(2, 6), "half": (2,), "number": range(2, largest + 1)}
        compute = STEP_ARITHMETIC[phrase.operator]
        whole = [n for n in ranges[phrase.operand] if phrase.operator != "/" or value % n == 0]
        return [n for n in whole if self.fits(compute(value, n))]

    def begin(self, *, with_step: bool) -> None:
        """Say how the story begins; an opening with an operation is its first step."""
        openings = STORY_TOPICS[self.topic].openings
        opening = self.rng.choice([phrase for phrase in openings if bool(phrase.operator) == with_step])
        largest, most = self.settings.max_number, self.settings.max_value
        first, second = self.rng.randint(3, largest), self.rng.randint(2, largest)
        if opening.operator == "*":
            second = self.rng.randint(2, 9)
            first = self.rng.randint(2, min(largest, most // second))
        elif not opening.operator and self.rng.random() < 0.5:
            first = self.rng.randint(2, 9) * self.rng.randint(2, 2 * largest // 9)  # divisible
        elif not opening.operator:
            first = self.rng.randint(3, 2 * largest)
        self.tell(opening.text, n=first, k=second)
        self.value = first
        if opening.operator:
            left, right = (second, first) if opening.operator == "*" else (first, second)
            self.add_step(left, opening.operator, right, opening.line)

    def go_on(self, *, steps_left: int) -> bool:
        """Let one more thing happen; False if nothing fits."""
        by_operator: dict[str, list[StoryPhrase]] = {}
        for phrase in STORY_TOPICS[self.topic].phrases:
            allowed = phrase not in self.told and (steps_left == 1 or not phrase.ends)
            if allowed and self.fitting_operands(phrase):
                by_operator.setdefault(phrase.operator, []).append(phrase)
        ways = sorted(by_operator) + ["/"] * ("/" in by_operator)  # divisions fit seldom, so they count twice
        if steps_left == 1 and self.before:
            earlier = self.before[1]
            ways += ["together"] * self.fits(earlier + self.value)
            ways += ["difference"] * self.fits(abs(earlier - self.value))
        if steps_left >= 2 and self.topic == "money" and self.value >= 10:
            ways.append("shopping")
        if not ways:
            return False
        way = self.rng.choice(ways)
        if way in ("together", "difference"):
            self.compare_with_before(together=way == "together")
        elif way == "shopping":
            self.go_shopping()
        else:
            self.happen(self.rng.choice(by_operator[way]))
        return True

    def happen(self, phrase: StoryPhrase) -> None:
        """Choose a number for the phrase, say it, write its step, and move on to the new quantity."""
        number = self.rng.choice(self.fitting_operands(phrase))
        in_words = "twice" if number == 2 else f"{number} times"
        other, before = self.unused_names[-1], (self.owner, self.value)
        if phrase.topic == "packed":  # not the containers of the opening
            self.words["b"] = self.rng.choice([bags for bags in STORY_CONTAINERS if bags != self.words["b"]])
            self.words["bag"] = STORY_CONTAINERS[self.words["b"]]
        self.tell(phrase.text, n=in_words if phrase.operand == "times" else number)
        left, right = (number, self.value) if phrase.operator == "goal" else (self.value, number)
        self.add_step(left, phrase.operator.replace("goal", "-"), right, phrase.line, other=other)
        if phrase.to_other:
            self.owner, self.before = other, before
        if phrase.topic:  # the quantity may now count other things
            self.topic, self.before = phrase.topic, None
            if "{x}" in phrase.text:
                self.words["o"] = self.words["x"]
            if phrase.topic == "money":
                self.words["o"] = "dollars"
            if phrase.topic == "things":
                self.topic = "food" if self.words["o"] in STORY_TOPICS["food"].things else "collection"
        self.told.append(phrase)
        self.asked = phrase.ends

    def compare_with_before(self, *, together: bool) -> None:
        """End with a question about this person and the one before: their sum or their difference."""
        topic = STORY_TOPICS[self.topic]
        (poor, less), (rich, more) = sorted([self.before, (self.owner, self.value)], key=lambda who: who[1])
        if together:
            self.tell(f"How many {{o}} do {rich} and {poor} {topic.have} together?")
            self.add_step(more, "+", less, f"Together they {topic.have} {{c}} {{o}}.")
        else:
            self.tell(f"How many more {{o}} does {rich} {topic.have} than {poor}?")
            self.add_step(more, "-", less, f"{rich} {topic.has} {{c}} more {{o}}.")
        self.asked = True

    def go_shopping(self) -> None:
        """Two steps at once: buy some things at a price, and pay."""
        money = self.value
        number = self.rng.randint(2, min(9, money // 4))
        price = self.rng.randint(2, min(9, (money - 2) // number))
        self.tell("{P} buys {k} {x} for {n} dollars each.", n=price, k=number)
        self.add_step(number, "*", price, "The {x} cost {c} dollars.")
        self.add_step(money, "-", self.value, "{N} has {c} dollars.")
        self.before = None

    def distract(self) -> None:
        fitting = [text for text in STORY_DISTRACTORS if STORY_TOPICS[self.topic].has or "{has}" not in text]
        self.tell(self.rng.choice(fitting), n=self.rng.randint(5, self.settings.max_number))

"""The grammar of the word problems: topics, and the phrases that change a quantity.

A story follows one quantity ("Tom has 12 apples") through phrases; each applies one operation to what stands there so
far. The wording alone decides which: some operands are words ("twice", "half"), some comparisons run backwards ("Tom
has 5 more apples than Ann": Ann has fewer), some questions go back to an earlier quantity ("together"). The vocabulary
is closed and small, about 210 words, so that a tiny model can learn it.

In a template: {N} the owner by name, {P} the owner or a pronoun, {Q} another person, {o} the things, {n} and {k}
numbers, {c} the calculation, {has}/{have} the topic's verb, {b}/{bag} containers, {x} other things, {at} a place.
"""

from dataclasses import dataclass

STORY_PRONOUNS = {
    **dict.fromkeys(("Tom", "Ben", "Max", "Sam", "Leo", "Paul", "Omar", "Jack"), "he"),
    **dict.fromkeys(("Ann", "Mia", "Eva", "Lucy", "Nina", "Rosa", "Kate", "Zoe"), "she"),
}
STORY_CONTAINERS = {"bags": "bag", "boxes": "box", "jars": "jar", "baskets": "basket"}


@dataclass(frozen=True)
class StoryPhrase:
    """One thing that may happen in a story, or one way to begin it."""

    operator: str  # `+ - * /` applied to the quantity so far; `goal`: a given number minus the quantity; empty: none
    text: str  # what the question says
    line: str = "{N} {has} {c} {o}."  # what the chain says
    operand: str = "number"  # which {n} fit: up to max_number, `factor` (2-9), `times` (2-5, in words), `half` (2)
    topic: str = ""  # the topic afterwards (`things`: the one that its noun belongs to); empty: unchanged
    to_other: bool = False  # whether the quantity afterwards is that of the newly named person
    ends: bool = False  # whether the text already asks the final question


@dataclass(frozen=True)
class StoryTopic:
    """What a story is about and what can happen there."""

    things: tuple[str, ...]  # plural nouns to choose from, with their place where they have one
    has: str  # the verb, third person singular; empty where nobody owns the things
    have: str  # the verb, plain form
    question: str  # the question asked when no phrase asked one
    openings: tuple[StoryPhrase, ...]  # how a story begins: {n} and, with an operator, {k} (on `*`: k times n)
    phrases: tuple[StoryPhrase, ...]  # what may happen next


STORY_COMPARISONS = (
    StoryPhrase("+", "{Q} {has} {n} more {o} than {N}.", "{Q} {has} {c} {o}.", to_other=True),
    StoryPhrase("-", "{Q} {has} {n} fewer {o} than {N}.", "{Q} {has} {c} {o}.", to_other=True),
    StoryPhrase("*", "{Q} {has} {n} as many {o} as {N}.", "{Q} {has} {c} {o}.", "times", to_other=True),
    StoryPhrase("/", "{Q} {has} half as many {o} as {N}.", "{Q} {has} {c} {o}.", "half", to_other=True),
    StoryPhrase("-", "{P} {has} {n} more {o} than {Q}.", "{Q} {has} {c} {o}.", to_other=True),
    StoryPhrase("+", "{P} {has} {n} fewer {o} than {Q}.", "{Q} {has} {c} {o}.", to_other=True),
    StoryPhrase("/", "{P} {has} {n} as many {o} as {Q}.", "{Q} {has} {c} {o}.", "times", to_other=True),
)
STORY_GIFTS = (
    StoryPhrase("+", "Then {Q} gives {N} {n} more {o}."),
    StoryPhrase("-", "Then {P} gives {n} {o} to {Q}."),
    StoryPhrase("/", "{P} gives half of the {o} to {Q}.", operand="half"),
    StoryPhrase("/", "{P} shares the {o} equally among {n} friends. How many {o} does each friend get?",
                "Each friend gets {c} {o}.", "factor", ends=True),
)  # fmt: skip
STORY_TRADES = (
    StoryPhrase("+", "{P} buys {n} more {o} in a shop."),
    StoryPhrase("+", "Later {P} gets {n} {o} as a gift."),
    StoryPhrase("-", "{P} sells {n} of the {o}."),
    StoryPhrase("*", "{P} sells all the {o} for {n} dollars each.", "{N} gets {c} dollars.", "factor", topic="money"),
    StoryPhrase("/", "{P} puts the {o} equally into {n} {b}.", "Each {bag} holds {c} {o}.", "factor", topic="packed"),
    StoryPhrase("goal", "{P} wants to have {n} {o}. How many more {o} does {N} need?",
                "{N} needs {c} more {o}.", ends=True),
)  # fmt: skip
STORY_THING_OPENINGS = (
    StoryPhrase("", "{N} has {n} {o}."),
    StoryPhrase("", "{N} starts the day with {n} {o}."),
    StoryPhrase("", "There are {n} {o} on the table of {N}."),
    StoryPhrase("*", "{N} has {k} {b} with {n} {o} in each {bag}."),
    StoryPhrase("*", "{N} gets {n} {o} every day for {k} days."),
    StoryPhrase("+", "{N} has {n} {o} at home and {k} {o} at school."),
)

STORY_TOPICS = {
    "collection": StoryTopic(
        things=("marbles", "stickers", "cards", "coins", "shells", "beads", "stamps", "books", "toys"),
        has="has", have="have", question="How many {o} does {N} have now?", openings=STORY_THING_OPENINGS,
        phrases=STORY_COMPARISONS + STORY_GIFTS + STORY_TRADES + (
            StoryPhrase("+", "{P} finds {n} more {o} in a drawer."),
            StoryPhrase("-", "{P} loses {n} of the {o}."),
            StoryPhrase("*", "{P} plays a game and wins until there are {n} as many {o} as before.", operand="times"),
        )),
    "food": StoryTopic(
        things=("apples", "pears", "plums", "cookies", "candies", "eggs", "nuts", "lemons", "muffins"),
        has="has", have="have", question="How many {o} does {N} have now?", openings=STORY_THING_OPENINGS,
        phrases=STORY_COMPARISONS + STORY_GIFTS + STORY_TRADES + (
            StoryPhrase("-", "{P} eats {n} of the {o}."),
            StoryPhrase("-", "{P} drops {n} of the {o} on the way."),
            StoryPhrase("/", "{P} eats {n} {o} every day. How many days do the {o} last?",
                        "The {o} last {c} days.", "factor", ends=True),
        )),
    "money": StoryTopic(
        things=("dollars",), has="has", have="have", question="How many dollars does {N} have now?",
        openings=(
            StoryPhrase("", "{N} has {n} dollars."),
            StoryPhrase("", "{N} takes {n} dollars to the market."),
            StoryPhrase("*", "{N} works {k} hours and earns {n} dollars an hour."),
            StoryPhrase("*", "{N} saves {n} dollars every week for {k} weeks."),
            StoryPhrase("+", "{N} has {n} dollars at home and {k} in a bag."),
        ),
        phrases=STORY_COMPARISONS + STORY_GIFTS + (
            StoryPhrase("+", "Then {P} earns {n} more dollars."),
            StoryPhrase("-", "{P} spends {n} dollars on a book."),
            StoryPhrase("-", "{P} pays {n} dollars for lunch."),
            StoryPhrase("/", "{P} spends all the money on {x} for {n} dollars each.", "{N} gets {c} {x}.",
                        "factor", topic="things"),
            StoryPhrase("goal", "A bike costs {n} dollars. How many more dollars does {N} need to buy it?",
                        "{N} needs {c} more dollars.", ends=True),
        )),
    "riding": StoryTopic(
        things=("miles",), has="rides", have="ride", question="How many miles does {N} ride in all?",
        openings=(
            StoryPhrase("", "{N} rides {n} miles on a bike in the morning."),
            StoryPhrase("*", "{N} rides {n} miles every day for {k} days."),
            StoryPhrase("*", "{N} rides {n} miles an hour for {k} hours on a bike."),
            StoryPhrase("+", "{N} rides {n} miles to school and {k} in the park."),
        ),
        phrases=STORY_COMPARISONS + (
            StoryPhrase("+", "After lunch {P} rides another {n} miles."),
            StoryPhrase("goal", "The whole way is {n} miles long. How many miles are left for {N}?",
                        "There are {c} miles left.", ends=True),
        )),
    "reading": StoryTopic(
        things=("pages",), has="reads", have="read", question="How many pages does {N} read in all?",
        openings=(
            StoryPhrase("", "{N} reads {n} pages on Monday."),
            StoryPhrase("*", "{N} reads {n} pages every day for {k} days."),
            StoryPhrase("+", "{N} reads {n} pages on Monday and {k} on Friday."),
        ),
        phrases=STORY_COMPARISONS + (
            StoryPhrase("+", "In the evening {P} reads another {n} pages."),
            StoryPhrase("goal", "The book has {n} pages. How many pages are left for {N}?",
                        "There are {c} pages left.", ends=True),
        )),
    "making": StoryTopic(
        things=("chairs", "lamps", "shirts", "kites", "clocks"), has="has to make", have="have to make",
        question="How many {o} does {N} have to make now?",
        openings=(
            StoryPhrase("", "{N} has to make {n} {o}."),
            StoryPhrase("*", "{N} has to make {n} {o} for each of {k} shops."),
            StoryPhrase("+", "{N} has to make {n} {o} for a school and {k} {o} for a shop."),
        ),
        phrases=STORY_COMPARISONS + (
            StoryPhrase("-", "On Monday {P} makes {n} of the {o}."),
            StoryPhrase("+", "Then a friend asks {N} for {n} more {o}."),
            StoryPhrase("/", "{Q} does half of the work for {N}.", operand="half"),
            StoryPhrase("/", "{P} makes {n} {o} an hour. How many hours does {N} need?",
                        "{N} needs {c} hours.", "factor", ends=True),
        )),
    "packed": StoryTopic(
        things=(), has="has", have="have", question="How many {o} are in each {bag}?", openings=(),
        phrases=(
            StoryPhrase("+", "Then {P} puts {n} more {o} into each {bag}.", "Each {bag} holds {c} {o}."),
            StoryPhrase("-", "Then {P} takes {n} {o} out of each {bag}.", "Each {bag} holds {c} {o}."),
            StoryPhrase("*", "{P} fills {n} more {b} in the same way for {Q}.", "{Q} has {c} {o}.",
                        "factor", topic="things", to_other=True),
        )),
    "visitors": StoryTopic(
        things=("people in the park", "kids in the pool", "birds in the tree", "ducks in the pond",
                "cars in the street", "people in the bus"),
        has="", have="", question="How many {o} are {at} now?",
        openings=(
            StoryPhrase("", "There are {n} {o} {at}."),
            StoryPhrase("*", "There are {k} groups of {n} {o} {at}.", "There are {c} {o}."),
            StoryPhrase("+", "First {n} {o} come, then {k} {o} come, and now they are {at}.", "There are {c} {o}."),
        ),
        phrases=(
            StoryPhrase("+", "Then {n} more {o} come.", "There are {c} {o}."),
            StoryPhrase("-", "Then {n} of the {o} leave.", "There are {c} {o}."),
            StoryPhrase("*", "An hour later there are {n} as many {o}.", "There are {c} {o}.", "times"),
            StoryPhrase("/", "Then half of the {o} leave.", "There are {c} {o}.", "half"),
            StoryPhrase("/", "The {o} make groups of {n}. How many groups are there?",
                        "There are {c} groups.", "factor", ends=True),
            StoryPhrase("goal", "There is room for {n} {o} in all. How many more {o} can come?",
                        "There is room for {c} more {o}.", ends=True),
        )),
}  # fmt: skip
STORY_STARTS = ("collection", "food", "money", "riding", "reading", "making", "visitors")
STORY_SCENES = (
    "It is a warm day in May.",
    "On Saturday {N} is at home.",
    "{N} and {Q} are good friends.",
    "{N} and {Q} live in a small town.",
    "The sun is shining.",
    "{N} goes to school with {Q}.",
)
STORY_DISTRACTORS = (
    "{N} is {n} years old.",
    "{Q} has {n} {x}.",
    "{Q} {has} {n} {o}.",
    "{Q} is {n} years old.",
    "{N} also has {n} {x}.",
    "{Q} has {n} cousins.",
    "{Q} lives {n} miles away.",
)

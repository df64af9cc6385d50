"""Endless word problems in GSM8K's exact format, by seed.

    question: Tom has 4 bags with 6 pears in each bag. He eats 5 of the pears. How many pears does Tom have
              now?
    answer:   Tom has 4*6=<<4*6=24>>24 pears.
              Tom has 24-5=<<24-5=19>>19 pears.
              #### 19

Each step computes with the result of the one before. Difficulty is the number of steps and the size of the numbers; all
quantities are whole and at least 2. They serve demonstrations and tests and never stand silently in GSM8K's place.
"""

import random
from pathlib import Path

from smollm_trm.data.rows import normalize_question, write_jsonl
from smollm_trm.data.word_grammar import STORY_CONTAINERS, STORY_PRONOUNS, STORY_SCENES, STORY_STARTS, STORY_TOPICS
from smollm_trm.data.word_stories import WordProblemSettings, WordStory
from smollm_trm.records import UserMistake, check_range


def tell_word_story(*, rng: random.Random, settings: WordProblemSettings) -> WordStory | None:
    """Tell one whole story; None where its numbers led nowhere."""
    topic = rng.choice(STORY_STARTS)
    things, _, place = rng.choice(STORY_TOPICS[topic].things).partition(" ")
    bags = rng.choice(list(STORY_CONTAINERS))
    owner, *others = rng.sample(list(STORY_PRONOUNS), len(STORY_PRONOUNS))
    words = {"o": things, "at": place, "b": bags, "bag": STORY_CONTAINERS[bags], "x": ""}
    story = WordStory(rng=rng, settings=settings, topic=topic, owner=owner, unused_names=others, words=words)
    n_steps = rng.randint(settings.min_steps, settings.max_steps)
    distracted = rng.random() >= settings.distractor_rate
    distract_after = rng.randrange(n_steps)
    if rng.random() < 0.5:
        story.tell(rng.choice(STORY_SCENES))
    story.begin(with_step=rng.random() < (0.3 if n_steps == 1 else 0.5))
    while (steps_left := n_steps - len(story.steps)) or not distracted:
        if not distracted and len(story.steps) >= distract_after:
            story.distract()
            distracted = True
        elif not story.go_on(steps_left=steps_left):
            return None
    if not story.asked:
        story.tell(STORY_TOPICS[story.topic].question)
    return story


def generate_word_problems(
    *, count: int, seed: int, settings: WordProblemSettings | None = None
) -> list[dict[str, str]]:
    """Make problems `{"question", "answer"}`, no two with the same normalised question."""
    check_range(1, count=count)
    rng, settings = random.Random(seed), settings or WordProblemSettings()
    rows: dict[str, dict[str, str]] = {}
    misses = 0
    while len(rows) < count:
        if misses == 10_000:
            raise UserMistake(f"count {count}: only {len(rows)} different problems were found; raise max_steps.")
        misses += 1
        if (story := tell_word_story(rng=rng, settings=settings)) is None:
            continue
        question = " ".join(story.sentences)
        if (normalized := normalize_question(question)) not in rows:
            chain = [step.written() for step in story.steps]
            rows[normalized] = {"question": question, "answer": "\n".join([*chain, f"#### {story.value}"])}
            misses = 0
    return list(rows.values())


def write_word_problems(
    folder: str | Path, *, train: int, test: int, seed: int, settings: WordProblemSettings | None = None
) -> Path:
    """Write `train.jsonl` and `test.jsonl`, the two files that GSM8K is loaded from, and return the folder."""
    check_range(1, train=train, test=test)
    rows = generate_word_problems(count=train + test, seed=seed, settings=settings)
    write_jsonl(Path(folder) / "train.jsonl", rows[test:])
    write_jsonl(Path(folder) / "test.jsonl", rows[:test])
    return Path(folder)

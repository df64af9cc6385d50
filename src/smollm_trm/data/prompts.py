"""From a row `{question, answer}` to token ids.

    Question: {question}
    Answer: <think> [slot] * M </think> {completion} <end of text>

and as Coconut writes it

    {question}
    <|start-latent|> [slot] * M <|end-latent|> {step} ... ### {answer} <end of text>

The latents stand inside the think block. Slots are ordinary placeholder tokens at ordinary positions, as in vision
models, so that masks, beams and caches need no special case. The prompt is written by a chat template, and that
template is saved with the model's tokenizer: whoever asks by it (`pipeline`, TRL, lm-eval) has the span.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from smollm_trm.data.answers import annotations_in, gold_answer, strip_annotations
from smollm_trm.data.curriculum import ALL_STEPS
from smollm_trm.records import UserMistake, check_choices, first_line

prompt_log = logging.getLogger("smollm_trm.data.prompts")

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ADDED_SLOT = "<|latent|>"
UNUSED_TOKENS = (ADDED_SLOT, "<|reserved_special_token_2|>", "<|fim_pad|>", "<empty_output>")
STEP_SOURCES = ("lines", "annotations")
TARGETS = ("steps", "answer", "think")


class SpanFormat(NamedTuple):
    """How a question and its latent span are written."""

    before: str = ""  # the question
    behind: str = ""  # the question
    gap: str = ""  # between that and the span
    opens: str = THINK_OPEN
    closes: str = THINK_CLOSE


PROMPT_FORMATS = {
    "plain": SpanFormat("Question: ", "\nAnswer:", " "),
    "bare": SpanFormat(),
    "chat": SpanFormat(),  # the tokenizer's own template stands around it
    "coconut": SpanFormat("", "\n", "", "<|start-latent|>", "<|end-latent|>"),
}
UNDATED = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{%- set messages = [{'role': 'system', 'content': '/system_override'}] + messages -%}{%- endif -%}"
)
"""SmolLM3's own template puts the date of today into the system prompt, unless this stands there."""
WITHOUT_COMPLETION = (
    "{%- if messages[-1]['role'] == 'assistant' -%}{%- set completion = messages[-1]['content'] -%}"
    "{%- set messages = messages[:-1] -%}{%- set add_generation_prompt = true -%}{%- endif -%}"
)
"""A conversation that ends in an answer is the prompt for it, and behind the span the answer."""
WITHOUT_SLOTS = (
    "{%%- set kept = namespace(messages=[]) -%%}{%%- for message in messages -%%}"
    "{%%- if message['content'] is string -%%}"
    "{%%- set message = dict(message, content=message['content'].replace(%(slot)s, '')) -%%}{%%- endif -%%}"
    "{%%- set kept.messages = kept.messages + [message] -%%}{%%- endfor -%%}{%%- set messages = kept.messages -%%}"
)
"""A user's text never opens a span, or fills one."""
CONVERSATION, SPAN = "{#- the conversation -#}", "{#- the latent span -#}"
COMPLETION = "{%- if completion is defined -%}{{ completion + eos_token }}{%- endif -%}"


@dataclass(frozen=True)
class EncodedExample:
    """One training row as token ids."""

    prompt: list[int]  # everything up to and including `</think>`; no loss here
    completion: list[int]  # the completion and its end-of-text token; all of it is supervised
    n_behind: int = 0  # the prompt's tokens from its first slot on; what is before ends in one column in a batch

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def reserved_token_id(tokenizer: PreTrainedTokenizerBase, contents: tuple[str, ...]) -> int | None:
    """Id of the first of these tokens that the tokenizer has as one token, or None."""
    for content in contents:  # token by token: the whole vocabulary as a dictionary takes a tenth of a second
        found = tokenizer.convert_tokens_to_ids(content)
        if found is not None and tokenizer.convert_ids_to_tokens(found) == content:
            return found
    return None


def slot_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the placeholder that marks a latent slot: a reserved token, or `<|latent|>`, added where there is none."""
    reserved = reserved_token_id(tokenizer, UNUSED_TOKENS)
    if reserved is None:
        tokenizer.add_tokens([ADDED_SLOT], special_tokens=True)
        reserved = tokenizer.convert_tokens_to_ids(ADDED_SLOT)
    return reserved


def add_markers(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make a tokenizer know Coconut's three tokens; their ids."""
    markers = [*PROMPT_FORMATS["coconut"][-2:], ADDED_SLOT]
    tokenizer.add_tokens(markers, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(markers)


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to pad with. SmolLM3's tokenizer names its end token as padding; the reserved padding token comes first."""
    reserved = reserved_token_id(tokenizer, ("<|finetune_right_pad_id|>",))
    if reserved is not None:
        return reserved
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@dataclass(frozen=True)
class PromptEncoder:
    """Turns questions and answers into ids, in one place for training, generation and evaluation."""

    tokenizer: PreTrainedTokenizerBase  # of the base model
    num_latents: int  # slots in the think block; 0 writes `<think></think>`
    target: str = "steps"
    """"steps" supervises the step-by-step solution and `#### n`; "answer" supervises `#### n` at once; "think" writes
    the steps inside the think block, `<think> {steps} </think> {n}`, which the prompt only opens."""
    prompt_format: str = "plain"
    """"plain" is `Question: ... Answer:`; "chat" is the tokenizer's chat template, without its date; "bare" is the
    question itself, and the answer without `####`, for a vocabulary that has nothing else; "coconut" is Coconut's."""
    keep_annotations: bool = False  # leave GSM8K's calculator annotations `<<48/2=24>>` in the completion
    think: bool = True  # whether there is a think block at all; an untuned base is asked without one
    steps_from: str = "lines"
    """What a step is: a line of the solution, or one of its annotations, which then are all that is written."""
    skip_steps: int = 0  # first steps that are not written

    def __post_init__(self) -> None:
        check_choices(self, target=TARGETS, prompt_format=PROMPT_FORMATS, steps_from=STEP_SOURCES)
        if self.target == "think" and (self.num_latents or not self.think or self.prompt_format == "coconut"):
            raise UserMistake("target='think' thinks in text: it goes with use_trm=False and 'plain' or 'chat' prompts")
        if self.prompt_format == "chat" and not self.tokenizer.chat_template:
            raise UserMistake("prompt_format='chat': this tokenizer has no chat template; choose 'plain'")

    @cached_property
    def slot_token(self) -> str:
        """The placeholder's text; empty without latents."""
        return self.tokenizer.convert_ids_to_tokens(slot_token_id(self.tokenizer)) if self.num_latents else ""

    @cached_property
    def span_text(self) -> str:
        """The think block with its slots, or only its begin for thinking in text; empty without one."""
        opens, closes = PROMPT_FORMATS[self.prompt_format][-2:]
        closes = "" if self.target == "think" else closes
        return f"{opens}{self.slot_token * self.num_latents}{closes}" if self.think else ""

    @cached_property
    def template(self) -> str:
        """The chat template (Jinja) that writes a prompt; only a conversation's last answer has a span before it."""
        if self.prompt_format == "chat":
            given, gap = self.tokenizer.chat_template, ""
            body = given.rpartition(CONVERSATION)[2].partition(SPAN)[0]  # a model's own template is taken apart again
            head = UNDATED if "/system_override" in body else ""
            head += WITHOUT_SLOTS % {"slot": repr(self.slot_token)} if self.slot_token else ""
        else:
            before, behind, gap, *_ = PROMPT_FORMATS[self.prompt_format]
            content = (
                f"message['content'].replace({self.slot_token!r}, '')" if self.slot_token else "message['content']"
            )
            # Some tokenizers write a first token without saying so in add_bos_token; "bare" may not know an x.
            starts = self.ids_of("x")[:1] if self.prompt_format != "bare" else []
            head = "{{ bos_token }}" if starts == [self.tokenizer.bos_token_id] else ""
            body = (
                "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
                f"{{{{ {before!r} + {content} + {behind!r} }}}}"
                "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + eos_token }}{%- endif -%}"
                "{%- endfor -%}"
            )
        span = (
            f"{{%- if add_generation_prompt -%}}{{{{ {gap + self.span_text!r} }}}}{{%- endif -%}}" if self.think else ""
        )
        return f"{head}{WITHOUT_COMPLETION}{CONVERSATION}{body}{SPAN}{span}{COMPLETION}"

    def prompt_text(self, question: str | list[dict[str, str]]) -> str:
        """The whole prompt as text: question (or messages up to one), slots, `</think>`; no slot in a question."""
        if self.slot_token and self.slot_token in question:
            prompt_log.warning("left the latent slot's own token out of a question: %.60r", question)
            question = question.replace(self.slot_token, "")
        chat = [{"role": "user", "content": question}] if isinstance(question, str) else question
        how = {"add_generation_prompt": True, "tokenize": False}
        return self.tokenizer.apply_chat_template(chat, chat_template=self.template, **how)

    def encode_prompt(self, question: str) -> list[int]:
        return self.ids_of(self.prompt_text(question), add_special_tokens=False)

    def ids_of(self, text: str, **options: Any) -> list[int]:
        """What the tokenizer makes of a text; one that it cannot read is refused."""
        try:
            return self.tokenizer(text, **options)["input_ids"]
        except Exception as error:  # a bare one, of a vocabulary without an unknown token
            raise UserMistake(f"the tokenizer cannot read {text[:60]!r} ({first_line(error)})") from error

    def steps(self, answer: str) -> list[str]:
        """The steps of a solution, without its final answer."""
        if self.steps_from == "annotations":
            return annotations_in(answer)
        text = answer if self.keep_annotations else strip_annotations(answer)
        return [line.strip() for line in text.rpartition("####")[0].split("\n") if line.strip()]

    def written_steps(self, answer: str) -> list[str]:
        return [] if self.target != "steps" else self.steps(answer)[self.skip_steps :]

    def completion_parts(self, answer: str, skip_steps: int | None = None) -> list[str]:
        """What the model is to write behind the span, without the end of text; each part is tokenized for itself."""
        skip = ALL_STEPS if self.target == "answer" else self.skip_steps if skip_steps is None else skip_steps
        if self.prompt_format == "coconut":
            return [*(f"{step}\n" for step in self.steps(answer)[skip:]), f"### {gold_answer(answer)}"]
        if self.target == "answer" and self.prompt_format == "bare":
            return [gold_answer(answer)]
        if self.target == "think":
            return [" " + "\n".join([*self.steps(answer), f"{THINK_CLOSE} {gold_answer(answer)}"])]
        if skip or self.steps_from == "annotations":
            return [" " + "\n".join([*self.steps(answer)[skip:], f"#### {gold_answer(answer)}"])]
        return [" " + (answer if self.keep_annotations else strip_annotations(answer)).strip()]

    def completion_text(self, answer: str) -> str:
        return "".join(self.completion_parts(answer))

    def results_for_latents(self, answer: str, latents_per_step: int, *, repeat_last: bool = False) -> list[int | None]:
        """What each latent is to say: a solution's results in order, each in its own latents and ended by a newline,
        the last, if asked for, once more in all that are left; None for latents that may say anything.
        """
        asked: list[int | None] = [None] * self.num_latents
        results = [step.strip("<>").rpartition("=")[2] + "\n" for step in annotations_in(answer)]
        tokens = self.tokenizer(results, add_special_tokens=False)["input_ids"] if results else [[]]
        places = range(0, self.num_latents, latents_per_step)
        tokens += len(places) * [tokens[-1] if repeat_last else []]
        for at, result in zip(places, tokens, strict=False):
            room = min(latents_per_step, self.num_latents - at)
            asked[at : at + room] = [*result, *[None] * room][:room]
        return asked

    def encode_completion(self, answer: str, skip_steps: int | None = None) -> list[int]:
        parts = self.tokenizer(self.completion_parts(answer, skip_steps), add_special_tokens=False)["input_ids"]
        return [*(token for part in parts for token in part), self.tokenizer.eos_token_id]

    def encode(
        self, row: dict[str, str], *, n_slots: int | None = None, skip_steps: int | None = None
    ) -> EncodedExample:
        """One row `{question, answer}` as ids; with another number of slots or of steps left out, if given."""
        prompt, n_behind = self.encode_prompt(row["question"]), 0
        if self.num_latents:
            slot = slot_token_id(self.tokenizer)
            first = prompt.index(slot)
            behind = prompt[first + self.num_latents :]
            slots = [slot] * (self.num_latents if n_slots is None else n_slots)
            prompt, n_behind = prompt[:first] + slots + behind, len(slots) + len(behind)
        return EncodedExample(prompt, self.encode_completion(row["answer"], skip_steps), n_behind)

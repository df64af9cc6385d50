"""From a row `{question, answer}` to token ids.

    Question: {question}
    Answer: <think> [slot] * M </think> {completion} <end of text>

The latents stand inside the think block, where SmolLM3's own no-think format has nothing: the untrained base already
knows what to do after it. Slots are ordinary placeholder tokens, as in vision models, so that masks, positions, beams
and caches need no special case.
"""

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from smollm_trm.data.answers import gold_answer, strip_annotations

prompt_log = logging.getLogger("smollm_trm.data.prompts")

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ADDED_SLOT = "<|latent|>"


@dataclass(frozen=True)
class EncodedExample:
    """One training row as token ids."""

    prompt: list[int]
    """Everything up to and including `</think>`; no loss here."""
    completion: list[int]
    """The completion and its end-of-text token; all of it is supervised."""

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
    """Id of the placeholder that marks a latent slot: a reserved token, or `<|latent|>`, added where there is none.

    It never stands in a question, and the base never sees it: its embedding is replaced by a latent, so the base's
    embedding table needs no row for it.
    """
    reserved = reserved_token_id(tokenizer, (ADDED_SLOT, "<|reserved_special_token_2|>", "<|fim_pad|>"))
    if reserved is None:
        tokenizer.add_tokens([ADDED_SLOT], special_tokens=True)
        reserved = tokenizer.convert_tokens_to_ids(ADDED_SLOT)
    return reserved


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to pad with. SmolLM3's tokenizer names its end token as padding; the reserved padding token comes first."""
    reserved = reserved_token_id(tokenizer, ("<|finetune_right_pad_id|>",))
    if reserved is not None:
        return reserved
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@dataclass(frozen=True)
class PromptEncoder:
    """Turns questions and answers into ids, in one place for training, generation and evaluation.

    Args:
        tokenizer: of the base model.
        num_latents: slots in the think block; 0 writes `<think></think>`.
        target: "steps" supervises the step-by-step solution and `#### n`; "answer" supervises `#### n` at once.
        prompt_format: "plain" is `Question: ... Answer:`; "chat" is the tokenizer's chat template, without its date;
            "bare" is the question itself, and the answer without `####`, for a vocabulary that has nothing else.
        keep_annotations: leave GSM8K's calculator annotations `<<48/2=24>>` in the completion.
    """

    tokenizer: PreTrainedTokenizerBase
    num_latents: int
    target: str = "steps"
    prompt_format: str = "plain"
    keep_annotations: bool = False

    def __post_init__(self) -> None:
        if self.target not in ("steps", "answer"):
            raise ValueError(f"target={self.target!r}: choose 'steps' or 'answer'")
        if self.prompt_format not in ("plain", "chat", "bare"):
            raise ValueError(f"prompt_format={self.prompt_format!r}: choose 'plain', 'chat' or 'bare'")

    def question_text(self, question: str) -> str:
        """The prompt's text up to and including `<think>`."""
        if self.prompt_format == "plain":
            return f"Question: {question}\nAnswer: {THINK_OPEN}"
        if self.prompt_format == "bare":
            return question + THINK_OPEN
        messages = [{"role": "user", "content": question}]
        if "/system_override" in (self.tokenizer.chat_template or ""):
            messages.insert(0, {"role": "system", "content": "/system_override"})  # or the date gets in
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text + THINK_OPEN

    def encode_question(self, question: str) -> list[int]:
        """Ids up to and including `<think>`. The slot's token, should it stand in the question, is left out."""
        text, slot = self.question_text(question), slot_token_id(self.tokenizer)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if slot in ids:
            prompt_log.warning("left the latent slot's own token out of a question: %.60r", question)
            ids = [token for token in ids if token != slot]
        bos = [self.tokenizer.bos_token_id]  # some tokenizers write it without saying so in add_bos_token
        return bos + ids if self.prompt_format == "plain" and self.tokenizer("x")["input_ids"][:1] == bos else ids

    def encode_span(self) -> list[int]:
        """Ids of the slots and of `</think>`."""
        closing = self.tokenizer(THINK_CLOSE, add_special_tokens=False)["input_ids"]
        return [slot_token_id(self.tokenizer)] * self.num_latents + closing

    def encode_prompt(self, question: str) -> list[int]:
        """Ids of the whole prompt: question, slots, `</think>`."""
        return self.encode_question(question) + self.encode_span()

    def completion_text(self, answer: str) -> str:
        """What the model is to write after `</think>`, without the end of text."""
        if self.target == "answer":
            return gold_answer(answer) if self.prompt_format == "bare" else f" #### {gold_answer(answer)}"
        return " " + (answer if self.keep_annotations else strip_annotations(answer)).strip()

    def encode_completion(self, answer: str) -> list[int]:
        """Ids of the completion and the end-of-text token."""
        ids = self.tokenizer(self.completion_text(answer), add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def encode(self, row: dict[str, str]) -> EncodedExample:
        """One row `{question, answer}` as ids."""
        return EncodedExample(self.encode_prompt(row["question"]), self.encode_completion(row["answer"]))

"""The reasoner before the adapter: it learns to say the results of the steps from what an untouched base reads.

A fresh reasoner has arithmetic to learn and LoRA has not, so side by side LoRA learns the task around latents that say
nothing yet (docs/log.md). Alone a step costs a fraction: nothing is written, and the base stands still, so every
question is read once and its hidden states are kept in a file.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from smollm_trm.data.batching import IGNORED_LABEL, pad_left
from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.reasoner import Thought
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.training.module import SmolLMTRMLightningModule

READ_AT_ONCE = 32


class KeptPrompt(Prompt):
    """Prompts whose hidden states `(B, L, D)` are known already, a tensor for each layer that the reasoner reads."""

    def __init__(self, states: list[Tensor], prompt: Prompt) -> None:
        super().__init__(decoder=prompt.decoder, embeddings=prompt.embeddings, mask=prompt.mask, n_slots=None)
        self.states = states

    def hidden_states(self, depths: Sequence[int]) -> list[Tensor]:
        return self.states


class KeptStates:
    """Hidden states of questions, ids up to the first slot, read once by a frozen base and kept in bf16 in a
    memory-mapped temporary file, `n_read_layers * D * 2` bytes a token."""

    def __init__(self, model: SmolLMv3WithTRM, questions: Sequence[tuple[int, ...]]) -> None:
        self.depths = model.reasoner.read_depths
        questions = sorted(set(questions), key=lambda ids: (len(ids), ids))
        n_tokens, width = sum(map(len, questions)), len(self.depths) * model.config.hidden_size
        with tempfile.TemporaryFile() as file:  # it has no name: gone when this process is
            size = 2 * n_tokens * width
            try:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a full disk is told of here
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                place = f"{size / 2**30:.1f} GiB in {tempfile.gettempdir()}"
                raise OSError(f"the questions' states need {place}: free it, or set TMPDIR ({error})") from error
            kept = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.bfloat16)
        self.states = kept.view(n_tokens, width)
        begins = accumulate(map(len, questions), initial=0)
        self.places = {ids: slice(at, at + len(ids)) for ids, at in zip(questions, begins, strict=False)}
        for at in range(0, len(questions), READ_AT_ONCE):
            self._read(model, questions[at : at + READ_AT_ONCE])

    @torch.no_grad()
    def _read(self, model: SmolLMv3WithTRM, questions: list[tuple[int, ...]]) -> None:
        ids, mask = pad_left(questions, 0)
        mask = mask.bool().to(model.device)
        embeddings = model.get_input_embeddings()(ids.to(model.device))
        prompt = Prompt(decoder=model.model.language_model, embeddings=embeddings, mask=mask, n_slots=None)
        layers = torch.cat(prompt.hidden_states(self.depths), dim=-1)
        for row, question in zip(layers, questions, strict=True):
            self.states[self.places[question]] = row[-len(question) :].to("cpu", torch.bfloat16)

    def prompt(self, prompt: Prompt, questions: Sequence[tuple[int, ...]]) -> KeptPrompt:
        """The same prompts, left-padded, with what was kept of them."""
        batch, length, size = prompt.embeddings.shape
        states = torch.zeros(batch, length, self.states.shape[1], dtype=torch.bfloat16)
        for row, question in enumerate(questions):
            states[row, length - len(question) :] = self.states[self.places[question]]
        layers = states.to(prompt.embeddings.device).split(size, dim=-1)
        return KeptPrompt(list(layers), prompt)


class ReasonerFirstModule(SmolLMTRMLightningModule):
    """Trains the reasoner alone, on what `latents_per_step` asks of its latents; see `reasoner_steps`."""

    @cached_property
    def kept(self) -> KeptStates:
        """Every question of both parts, read when the first is asked for: a finished run reads none again."""
        data = self.trainer.datamodule
        examples = data.train_set.examples + data.dev_set.examples
        questions = [tuple(one.prompt[: len(one.prompt) - one.n_behind]) for one in examples]  # up to the first slot
        was_training = self.model.training
        self.model.eval()
        kept = KeptStates(self.model, questions)
        self.model.train(was_training)
        return kept

    def thoughts(self, batch: dict[str, Tensor], **options) -> list[Thought]:
        """What the reasoner thinks about a batch's questions, whose states are kept."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        slots = self.model.model.spans(ids)
        columns = torch.arange(ids.shape[1], device=ids.device)
        before = mask & (columns < slots.int().argmax(1, keepdim=True))
        questions = [tuple(row[real].tolist()) for row, real in zip(ids, before, strict=True)]
        prompt = self.model.model.prompt_before(ids, batch["attention_mask"], slots)
        return self.model.reasoner.think(self.kept.prompt(prompt, questions), **options)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of what latents say, per supervised token of an answer, as where both are trained."""
        every = self.supervise == "all"
        options = {"n_steps": None if every else self.draw_step(), "gradient_at_every_step": every}
        thoughts = self.thoughts(batch, **options)[0 if every else -1 :]
        losses = [self.latent_loss(thought, batch["latent_labels"]) for thought in thoughts]
        n_asked = (batch["latent_labels"] != IGNORED_LABEL).sum().clamp_min(1)
        self.log("train_loss", losses[-1].detach() / n_asked, prog_bar=True, sync_dist=True)
        for name, value in self.model.reasoner.logs(thoughts[-1]).items():
            self.log(name, value)
        return torch.stack(losses).mean() / self.step_totals(batch)[0]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss per result's token on the dev part, and the share of rows whose results are all right."""
        labels = batch["latent_labels"]
        asked = labels != IGNORED_LABEL
        logits = self.model.reasoner.words(self.thoughts(batch)[-1].latents, self.model.lm_head)
        loss = F.cross_entropy(logits[asked].float(), labels[asked], reduction="sum")
        right = ((logits.argmax(-1) == labels) | ~asked).all(1)[asked.any(1)]
        self.log_mean("dev_loss", loss / asked.sum().clamp_min(1), int(asked.sum()))
        self.log_mean("dev_results_right", right.float().mean(), len(right))

"""Recursive reasoning: refine an answer by thinking again, with one small network.

Source: "Less is More: Recursive Reasoning with Tiny Networks" (TRM), section 3. The question `x` is fixed, the answer
`y` and the latent `z` are refined: from the question itself, or, as in the paper, from fixed random vectors. One
supervision step is

    T times:  n times  z = net(z + y + x),  then  y = net(z + y)

of which only the last of the T rounds carries gradients. Between supervision steps the state is detached. This is the
one place where the recursion is written; who calls it decides what the question is and how the answer is used.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from smollm_trm.models.blocks import TinyRecursiveNetwork, truncated_normal
from smollm_trm.records import check_range, picked

MOST_STEPS = 1000


class RecursiveReasoningBase(nn.Module):
    """The recursion of TRM around any network that maps `(B, T, D)` to `(B, T, D)`.

    Args:
        network: called `n_deep_recursions * (n_latent_steps + 1)` times in a supervision step.
        n_latent_steps: n, updates of the latent before the answer is updated.
        n_deep_recursions: T, rounds of a supervision step; all but the last run without gradient.
        n_supervision_steps: steps after which an answer may be read off and supervised.
        from_question: answer and latent start as the question instead of as the paper's constants y0 and z0.

    Shapes: question x, answer y, latent z are `(B, T, D)`; mask `(B, T)`, True = real.
    """

    def __init__(
        self,
        *,
        network: TinyRecursiveNetwork,
        n_latent_steps: int = 4,
        n_deep_recursions: int = 2,
        n_supervision_steps: int = 4,
        from_question: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.n_latent_steps = n_latent_steps
        self.n_deep_recursions = n_deep_recursions
        self.n_supervision_steps = n_supervision_steps
        check_range(1, MOST_STEPS, **picked(self, "n_latent_steps", "n_deep_recursions", "n_supervision_steps"))
        self.from_question = from_question
        # Buffers: with T > 1 no gradient ever reaches them, so as parameters they would be dead weight.
        self.register_buffer("initial_answer", truncated_normal(network.dim))  # y0
        self.register_buffer("initial_latent", truncated_normal(network.dim))  # z0

    def start(self, question: Tensor) -> tuple[Tensor, Tensor]:
        """The state before the first supervision step: `(answer, latent)`, each `(B, T, D)`."""
        if self.from_question:
            return question, question
        return self.initial_answer.expand_as(question), self.initial_latent.expand_as(question)

    def refine(
        self, question: Tensor, answer: Tensor, latent: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One supervision step. Only the last round carries gradients: through all its n + 1 calls of the network."""
        for rounds_left in reversed(range(self.n_deep_recursions)):
            with nullcontext() if rounds_left == 0 else torch.no_grad():
                for _ in range(self.n_latent_steps):
                    latent = self.network(question + answer + latent, mask)
                answer = self.network(answer + latent, mask)
        return answer, latent

    def forward(
        self,
        question: Tensor,
        mask: Tensor | None = None,
        *,
        n_supervision_steps: int | None = None,
        gradient_at_every_step: bool = False,
    ) -> list[Tensor]:
        """The answer `(B, T, D)` after each supervision step, the state detached in between.

        Args:
            n_supervision_steps: how many steps to make; the module's own number when None.
            gradient_at_every_step: False records a graph for the last step only, at the price of one step.
        """
        answer, latent = self.start(question)
        answers = []
        for steps_left in reversed(range(n_supervision_steps or self.n_supervision_steps)):
            with nullcontext() if gradient_at_every_step or steps_left == 0 else torch.no_grad():
                answer, latent = self.refine(question, answer.detach(), latent.detach(), mask)
            answers.append(answer)
        return answers

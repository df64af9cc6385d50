"""The Tiny Recursive Model: compress the question to M latents, refine them recursively, hand them back."""

from dataclasses import dataclass

from torch import Tensor, nn

from smollm_trm.models.blocks import WIDEST, TinyRecursiveNetwork
from smollm_trm.models.reasoners.compressor import CompressedReader, CompressorSettings
from smollm_trm.models.reasoners.reasoner import ParameterGroup, Thought
from smollm_trm.models.recursion import MOST_STEPS, RecursiveReasoningBase
from smollm_trm.records import UserMistake, check_choices, check_range, picked

MOST_LAYERS = 64
# What `{"preset": ...}` stands for; "paper" is TRM as published: six latent steps, free branches, fixed start.
PAPER_COUNTS = {"n_latent_steps": 6, "n_deep_recursions": 3, "n_supervision_steps": 16}
TRM_PRESETS = {"paper": {**PAPER_COUNTS, "branch_scale": None, "start": "fixed"}}


@dataclass(frozen=True, kw_only=True)
class TRMSettings(CompressorSettings):
    """How a `HiddenStateTRM` is built."""

    n_layers: int = 2
    """Transformer blocks of the recursive network."""
    n_heads: int = 8
    """Attention heads of each block."""
    n_latent_steps: int = 4
    """n: updates of the latent before the answer is updated (the paper: 6)."""
    n_deep_recursions: int = 2
    """T: rounds of a supervision step, all but the last without gradient (the paper: 3)."""
    n_supervision_steps: int = 4
    """Steps after which latents may be read off (the paper: 16)."""
    dropout: float = 0.0
    """Dropout probability inside the recursive network."""
    branch_scale: float | None = 0.3
    """Size of the recursion's residual branches, relative to its state; None leaves them free, as in the paper."""
    start: str = "question"
    """What the recursion's answer and latent start as: "question" (the compressed question) or "fixed" (the paper's
    constants y0 and z0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, MOST_STEPS, **picked(self, "n_latent_steps", "n_deep_recursions", "n_supervision_steps"))
        check_range(1, MOST_LAYERS, n_layers=self.n_layers)
        check_range(1, WIDEST, n_heads=self.n_heads)
        check_choices(self, start=("question", "fixed"))
        if self.branch_scale is not None and not self.branch_scale > 0:
            raise UserMistake(f"branch_scale={self.branch_scale}: must be above 0, or None for free branches")
        if not 0 <= self.dropout < 1:
            raise UserMistake(f"dropout={self.dropout}: must be in [0, 1)")


class HiddenStateTRM(CompressedReader):
    """TRM on a language model's hidden states; its latents are the recursion's answer."""

    Settings = TRMSettings

    def __init__(self, settings: TRMSettings, *, num_latents: int, hidden_size: int, depth: int) -> None:
        super().__init__(settings, num_latents=num_latents, hidden_size=hidden_size, depth=depth)
        self.n_supervision_steps = settings.n_supervision_steps
        of_network = picked(settings, "n_layers", "n_heads", "dropout", "branch_scale")
        self.recursion = RecursiveReasoningBase(
            network=TinyRecursiveNetwork(dim=self.dim, **of_network),
            **picked(settings, "n_latent_steps", "n_deep_recursions", "n_supervision_steps"),
            from_question=settings.start == "question",
        )
        self.halting_head = nn.Linear(self.dim, 1)
        nn.init.zeros_(self.halting_head.weight)
        nn.init.constant_(self.halting_head.bias, -5.0)

    def reason(
        self, hidden_states: list[Tensor], mask: Tensor, *, n_steps: int | None = None, **gradient: bool
    ) -> list[Thought]:
        """Latents and halting logit after each supervision step."""
        answers = self.recursion(self.compress(hidden_states, mask), n_supervision_steps=n_steps, **gradient)
        return [Thought(self.to_latents(answer), self.halting_head(answer[:, 0]).squeeze(-1)) for answer in answers]

    def parameter_groups(self, learning_rate: float) -> list[ParameterGroup]:
        """The recursion's network gets the learning rate divided by its calls with gradient: Adam's step does not
        shrink with the gradient, so n + 1 calls move the answer n + 1 times as far, and at the full learning rate it
        learns to say the same to every problem."""
        [(name, parameters, own_rate)] = super().parameter_groups(learning_rate)
        tied = list(self.recursion.parameters())
        others = [one for one in parameters if all(one is not other for other in tied)]
        slower = own_rate / (self.recursion.n_latent_steps + 1)
        return [ParameterGroup(name, others, own_rate), ParameterGroup("recursion", tied, slower)]

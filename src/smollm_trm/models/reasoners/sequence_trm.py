"""A recursion from the state before thinking to the state after it: compress, recurse, decompress, one latent.

`SequenceTRM` learns from pairs (`phases datagen`) what the base's final hidden state is once it has thought in text,
from its states before `<think>`. The reasoner puts that state into the span in place of the text. It enters relative to
the mean of such states: they point nearly the same way (the mean alone has cosine 0.92 to 0.98 to any of them), and the
part that they share says nothing about a problem.
"""

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smollm_trm.models.blocks import WIDEST, TinyRecursiveNetwork, lecun_linear, truncated_normal
from smollm_trm.models.dimension import DimensionCompressor
from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.compressor import StateStandardizer
from smollm_trm.models.reasoners.reasoner import LatentScale, Reasoner, ScaleSettings, Thought
from smollm_trm.models.recursion import RecursiveReasoningBase
from smollm_trm.records import UserMistake, check_range

BRANCH_SCALE = 0.3
"""As `TRMSettings.branch_scale`: with free branches the recursion says the same to every problem for a long time."""


@dataclass(frozen=True, kw_only=True)
class SequenceTRMSettings(ScaleSettings):
    """How the compressor and the recursion are built; they come trained from phases 1 and 2."""

    d_compressed: int = 256
    """D', the compressor's dimension and the recursion's width."""
    n_layers: int = 2
    """Transformer layers of the network."""
    n_heads: int = 8
    """Attention heads of each."""
    n_latent_steps: int = 6
    """n: updates of the latent before the answer is updated."""
    n_deep_recursions: int = 3
    """T: rounds of a supervision step, all but the last without gradient."""
    n_supervision_steps: int = 8
    """Steps after which the state may be read off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(1, WIDEST, **{name: value for name, value in vars(self).items() if name != "gain"})


class SequenceTRM(nn.Module):
    """TRM over a compressed context of any length with a learned reasoning token behind it.

    Shapes: context `(B, L, D')`, padded on the left, mask `(B, L)`; the state `(B, L + 1, D')` is refined, and its last
    position is read off as the prediction `(B, D')`.
    """

    def __init__(self, *, d_compressed: int, n_layers: int, n_heads: int, **steps: int) -> None:
        super().__init__()
        self.reasoning_token = nn.Parameter(truncated_normal(1, d_compressed))
        network = TinyRecursiveNetwork(dim=d_compressed, n_layers=n_layers, n_heads=n_heads, branch_scale=BRANCH_SCALE)
        self.recursion = RecursiveReasoningBase(network=network, **steps, from_question=True)
        self.to_state = lecun_linear(d_compressed, d_compressed)
        with torch.no_grad():
            self.to_state.weight.mul_(0.1)  # the first prediction is near the mean target
        self.halt_head = nn.Linear(d_compressed, 1)
        nn.init.zeros_(self.halt_head.weight)
        nn.init.constant_(self.halt_head.bias, -5.0)
        self.standardize = StateStandardizer(n_layers=1, hidden_size=d_compressed)
        self.register_buffer("target_mean", torch.zeros(d_compressed))
        self.register_buffer("target_scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, contexts: Tensor, targets: Tensor) -> None:
        """Take the statistics of training contexts `(T, D')`, all tokens of all rows, and of targets `(N, D')`."""
        self.standardize.mean.copy_(contexts.mean(0, keepdim=True))
        self.standardize.deviation.copy_(contexts.std(0, keepdim=True).clamp_min(1e-6))
        self.target_mean.copy_(targets.mean(0))
        self.target_scale.copy_((targets - targets.mean(0)).square().mean().sqrt().clamp_min(1e-6))

    def augment(self, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The standardised context with the reasoning token behind it, and its mask, `(B, L + 1, ...)`."""
        token = self.reasoning_token.expand(len(context), 1, -1)
        return torch.cat([self.standardize([context]), token], dim=1), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)

    def read(self, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted state `(B, D')` and halting logit `(B,)` from the recursion's answer `(B, L + 1, D')`."""
        last = answer[:, -1]
        return self.target_mean + self.target_scale * self.to_state(last), self.halt_head(last).squeeze(-1)

    def forward(
        self, context: Tensor, mask: Tensor, *, n_steps: int | None = None, gradient_at_every_step: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        question, whole = self.augment(context, mask)
        options = {"n_supervision_steps": n_steps, "gradient_at_every_step": gradient_at_every_step}
        return [self.read(answer) for answer in self.recursion(question, whole, **options)]


class PredictedStateReasoner(Reasoner):
    """Puts the predicted state after thinking into the span, a single latent."""

    Settings = SequenceTRMSettings

    def __init__(self, settings: SequenceTRMSettings, *, num_latents: int, hidden_size: int, depth: int) -> None:
        super().__init__(settings, num_latents=num_latents, hidden_size=hidden_size, depth=depth)
        if num_latents != 1:
            raise UserMistake(f"num_latents={num_latents}: the reasoner 'sequence_trm' predicts one state; set 1")
        network = {name: value for name, value in vars(settings).items() if name != "gain"}
        self.n_supervision_steps, self.depth = settings.n_supervision_steps, depth
        self.compressor = DimensionCompressor(hidden_size=hidden_size, d_compressed=settings.d_compressed)
        self.trm = SequenceTRM(**network)
        self.scale = LatentScale(hidden_size=hidden_size, gain=settings.gain)

    def to_latent(self, compressed: Tensor) -> Tensor:
        """The latent `(B, 1, D)` of a compressed state `(B, D')`; the mean state's is the scale's anchor."""
        centred = (compressed - self.trm.target_mean) / self.trm.target_scale
        wide, narrow = self.compressor.weight.shape[1], self.compressor.weight.shape[0]
        return self.scale(centred @ self.compressor.weight * (wide / narrow) ** 0.5).unsqueeze(1)

    def latents_of_states(self, states: Tensor) -> Tensor:
        return self.to_latent(self.compressor.compress(states))

    def think(self, prompt: Prompt, *, n_steps: int | None = None, **gradient: bool) -> list[Thought]:
        """Read what stands before `<think>` with the base as it was when the pairs were made: without an adapter, and
        without gradient."""
        layers = (module for module in prompt.decoder.modules() if isinstance(module, BaseTunerLayer))
        adapted = [layer for layer in layers if not layer.disable_adapters]
        for layer in adapted:
            layer.enable_adapters(False)
        try:
            states = prompt.hidden_states([self.depth])[0][:, :-1].detach()
        finally:
            for layer in adapted:
                layer.enable_adapters(True)
        found = self.trm(self.compressor.compress(states), prompt.mask[:, :-1], n_steps=n_steps, **gradient)
        return [Thought(self.to_latent(state), logit) for state, logit in found]

"""How much of a solution is written, and how many latents stand for the rest: one number, raised stage by stage.

    stage 0   question <start> <end> step 1, step 2, step 3 ### answer
    stage 1   question <start> z z <end> step 2, step 3 ### answer                 c_thought = 2
    stage 2   question <start> z z z z <end> step 3 ### answer
    ...       past max_latent_stage no step stays

Source: Coconut (Hao et al. 2024) and its published code, whose names and rows these are; any reasoner can be put under
it. Two of its modes have no latents: `no_thoughts`, and `icot`, which leaves out one step more in every stage without
the jump at the end (after Deng et al. 2024, who remove tokens rather than steps).
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

from smollm_trm.records import UserMistake, check_choices, check_range, picked

LATENT_MODES = ("coconut", "pause")
CURRICULUM_MODES = ("cot", "no_cot", *LATENT_MODES, "no_thoughts", "icot")
ALL_STEPS = 10_000  # more than any solution has


class RowPlan(NamedTuple):
    """What a row shows of its solution."""

    skip_steps: int  # first steps that are not written
    n_slots: int  # latents in their place


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Which rows a stage trains on; also a part of `TrainSettings`."""

    mode: str | None = None
    """A curriculum over the steps of a solution: "cot" (all steps), "no_cot" (none), "coconut" or "pause" (each stage
    replaces one step more by c_thought latents), "no_thoughts" (by nothing) or "icot" (the same, to the last step).
    What fills the latents is `reasoner`; modes without latents have none. None: `target` decides."""
    c_thought: int = 2
    """Latents in place of a step."""
    epochs_per_stage: int = 3
    """Epochs until one step more is left out."""
    max_latent_stage: int = 3
    """Steps that are replaced; in the stage after it no step is written at all."""
    pad_latent_to_max: bool = True
    """In the last stage, all latents for short solutions too, as for a problem whose solution nobody knows."""
    uniform_prob: float = 0.0
    """Probability that a row is shown in a stage drawn from all of its own."""
    first_stage: int = 0
    """The stage to begin with, such as 1 after a chain-of-thought run (load_model_path)."""

    def __post_init__(self) -> None:
        if self.mode is not None:
            check_choices(self, mode=CURRICULUM_MODES)
        check_range(1, **picked(self, "c_thought", "epochs_per_stage", "max_latent_stage"))
        check_range(0, first_stage=self.first_stage)
        check_range(0, 1, uniform_prob=self.uniform_prob)

    @property
    def has_latents(self) -> bool:
        return self.mode in LATENT_MODES

    @property
    def longest_span(self) -> int:
        """The most latents of a row."""
        return self.c_thought * self.max_latent_stage if self.has_latents else 0

    @property
    def staged(self) -> bool:
        return self.mode not in ("cot", "no_cot")

    def stage_of(self, epoch: int) -> int:
        """The stage of an epoch, counted from 0."""
        return self.first_stage + epoch // self.epochs_per_stage if self.staged else 0

    def plan(self, stage: int, n_steps: int = ALL_STEPS) -> RowPlan:
        """What a row whose solution has `n_steps` shows in a stage; without them, what an unsolved problem is given."""
        if self.mode == "no_cot":
            return RowPlan(ALL_STEPS, 0)
        if self.mode == "icot" or stage <= self.max_latent_stage:
            return RowPlan(stage, self.c_thought * stage if self.has_latents else 0)
        replaced = self.max_latent_stage if self.pad_latent_to_max else min(n_steps, self.max_latent_stage)
        return RowPlan(ALL_STEPS, self.c_thought * replaced if self.has_latents else 0)

    def drawn_stage(self, stage: int, n_steps: int, draw: random.Random) -> int:
        """The stage itself, or with probability `uniform_prob` one of the row's own."""
        mixed = self.staged and draw.random() < self.uniform_prob
        return draw.randrange(n_steps + 1) if mixed else stage

    def check_steps(self, longest: int) -> None:
        """Refuse a last stage that replaces more steps than the longest solution has."""
        if self.staged and self.mode != "icot" and self.max_latent_stage > longest:
            advice = "lower max_latent_stage, or choose other data or steps_from"
            told = f"the longest solution of the training rows has {longest} steps"
            raise UserMistake(f"max_latent_stage={self.max_latent_stage}: {told}; {advice}")

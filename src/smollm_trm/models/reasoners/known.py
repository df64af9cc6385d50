"""Every reasoner by its name: the whole registry."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from smollm_trm.models.blocks import WIDEST
from smollm_trm.models.reasoners.coconut import Coconut
from smollm_trm.models.reasoners.compressor import CompressedReader
from smollm_trm.models.reasoners.reasoner import Reasoner
from smollm_trm.models.reasoners.sequence_trm import PredictedStateReasoner
from smollm_trm.models.reasoners.static import PauseTokens, StaticLatents
from smollm_trm.models.reasoners.trm import TRM_PRESETS, HiddenStateTRM
from smollm_trm.records import UserMistake, check_range, settings_from

REASONERS: dict[str, type[Reasoner]] = {
    "trm": HiddenStateTRM,
    "compressor": CompressedReader,
    "static": StaticLatents,
    "pause": PauseTokens,
    "coconut": Coconut,
    "sequence_trm": PredictedStateReasoner,
}


def reasoner_class(name: str) -> type[Reasoner]:
    if name not in REASONERS:
        raise UserMistake(f"reasoner={name!r}: choose one of {', '.join(REASONERS)}")
    return REASONERS[name]


def complete_settings(name: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A reasoner's settings as plain values, presets and defaults filled in, each value checked."""
    given, where = dict(given or {}), "trm_kwargs" if name == "trm" else f"trm_kwargs of the reasoner {name!r}"
    preset = given.pop("preset", None)
    if preset not in (None, *TRM_PRESETS):
        raise UserMistake(f"{where}: preset={preset!r}: choose one of {', '.join(TRM_PRESETS)}")
    values = {**TRM_PRESETS.get(preset, {}), **given}
    return asdict(settings_from(reasoner_class(name).Settings, values, where))


def build_reasoner(
    name: str, settings: Mapping[str, Any], *, num_latents: int, hidden_size: int, depth: int
) -> Reasoner:
    check_range(1, WIDEST, num_latents=num_latents)
    kind = reasoner_class(name)
    chosen = kind.Settings(**complete_settings(name, settings))
    return kind(chosen, num_latents=num_latents, hidden_size=hidden_size, depth=depth)

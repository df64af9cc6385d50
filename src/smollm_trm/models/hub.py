"""Share a saved model: a card that states what was measured, and the upload."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id

from smollm_trm.models.configuration import LatentReasoningConfig, readable
from smollm_trm.models.loading import is_local
from smollm_trm.models.storage import CONFIG_FILE, SHARED_FILES, local_model_folder, read_config
from smollm_trm.records import UserMistake, first_line, write_json, write_text

PACKAGE = "smollm_trm"


def measured_lines(notes: Mapping[str, Any]) -> list[str]:
    """What a model's notes hold of training and evaluation, as the card's bullet points."""
    lines = []
    training = notes.get("training", {})
    if "split" in training:
        split = training["split"]
        lines.append(
            f"trained on {training['train_rows']} problems of {split['source']} (split seed {split['seed']}, "
            f"fingerprint `{split['fingerprint'][:16]}`) for {training['optimizer_steps']} optimizer steps"
        )
        if training["dev_loss"] is not None:
            lines.append(f"dev loss {training['dev_loss']:.4f} nats per token on {training['dev_rows']} dev problems")
    if "grpo" in notes:
        grpo = notes["grpo"]
        before, after, change = grpo["before"], grpo["after"], grpo["difference"]
        lines.append(
            f"then {grpo['optimizer_steps']} steps of GRPO ({grpo['train']}; {grpo['samples']} sampled answers): "
            f"{100 * before['accuracy']:.1f}% before, {100 * after['accuracy']:.1f}% after, of {after['total']} dev "
            f"problems ({100 * change['low']:+.1f} to {100 * change['high']:+.1f}, p {change['p_value']:.2g})"
        )
    for part, result in notes.get("evaluations", {}).items():
        low, high = result["interval"]
        lines.append(
            f"{part}: {100 * result['accuracy']:.1f}% of {result['total']} problems "
            f"(95% interval {100 * low:.1f} to {100 * high:.1f})"
        )
    return lines or ["nothing was measured yet"]


def index_entry(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    share, count = round(result["accuracy"], 4), f"of {result['total']} problems"
    dataset = {"type": result.get("source", "unknown").partition(" ")[0], "name": name}
    metric = {"type": "accuracy", "value": share, "name": count}
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [metric]}


def license_of(base: str) -> str | None:
    """The license that a base's card names, on the Hub or in its folder; None where there is none to be read."""
    place = Path(base).expanduser()
    card = (place.parent if place.suffix == ".gguf" else place) / "README.md" if is_local(base) else base
    try:
        return ModelCard.load(str(card), ignore_metadata_errors=True).data.license
    except Exception:  # whatever the Hub's client and its transport raise, by version; or a card that is none
        return None


def model_card(config: LatentReasoningConfig, *, repo_id: str = "this/repository", license: str | None = None) -> str:
    """The card of a model as Markdown: what it is, what was measured, how to use it; `license` is its base's."""
    span = f"a latent span of {config.num_latents} slots filled by the reasoner `{config.reasoner}`"
    base = config.base_model if config.base_model and not is_local(config.base_model) else ""
    header = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    header["tags"] = ["latent-reasoning", "trm", "peft"]
    noted = config.notes.get("license") or getattr(config.text_config, "license", None)
    header["license"] = license or (noted if isinstance(noted, str) else None) or "other"
    if header["license"] == "other":
        header["license_name"] = "unspecified"  # the Hub wants a name beside "other"
    if base:
        header["base_model"] = base
    title = base.rpartition("/")[2] or "a base of its own"
    with readable("the notes in config.json"):
        if "gsm8k" in config.notes.get("training", {}).get("split", {}).get("source", ""):
            header["datasets"] = ["openai/gsm8k"]
        if results := [index_entry(*one) for one in config.notes.get("evaluations", {}).items()]:
            header["model-index"] = [{"name": f"Latent reasoning with {title}", "results": results}]
        measured = "\n".join(f"- {line}" for line in measured_lines(config.notes))
    return (
        f"---\n{json.dumps(header, indent=2)}\n---\n\n"
        f"# Latent reasoning with {title}\n\n"
        f"{title} with {span if config.reasoner else 'no latent span (the baseline)'}, base weights: "
        f"{config.base_training}, target: {config.target}.\n\n"
        f"## What was measured\n\n{measured}\n\nThe dev part may have picked the checkpoint; only a figure named "
        "`test` is the official test set.\n\n"
        "## Use\n\n```bash\npip install .    # in a clone of smollm-trm's repository\n```\n\n"
        f"```python\nfrom {PACKAGE} import SmolLMv3WithTRM\n\n"
        f'model = SmolLMv3WithTRM.from_pretrained("{repo_id}")\n'
        'print(model.generate_with_thinking("Tom has 3 bags of 4 apples. How many apples is that?"))\n```\n'
    )


def add_evaluation(folder: str | Path, part: str, result: Mapping[str, Any]) -> None:
    """Note an evaluation in a saved model's configuration, for its card."""
    path = Path(folder) / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: result[name] for name in ("accuracy", "correct", "total", "interval", "source") if name in result}
    content["notes"] = content.get("notes") or {}
    content["notes"].setdefault("evaluations", {})[part] = kept
    write_json(path, content)


def push_model(folder: str | Path, repo_id: str, *, private: bool = True, dry_run: bool = False) -> list[str]:
    """Write the card, upload a saved model to "owner/name", and return the names of its files; a `dry_run` uploads
    nothing. Not a saved model, a base that is only here, or what the Hub refuses is a `UserMistake`."""
    check_repo_id(repo_id)
    folder = local_model_folder(folder) or Path(folder)
    config = read_config(folder)
    if config.base_model and is_local(config.base_model):
        advice = "train from a base on the Hub, or save the model after merge_and_unload()"
        raise UserMistake(f"{folder}: its base lies on this machine only, so nobody could load it; {advice}")
    base_license = license_of(config.base_model) if config.base_model else None
    write_text(folder / "README.md", model_card(config, repo_id=repo_id, license=base_license))
    return upload(folder, repo_id, private=private, dry_run=dry_run)


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        _, _ = repo_id.split("/")
    except ValueError as error:
        raise UserMistake(f"repo_id={repo_id[:100]!r}: no name that the Hub takes; give owner/name") from error


def upload(folder: Path, repo_id: str, *, private: bool, dry_run: bool) -> list[str]:
    files = sorted({path.relative_to(folder).as_posix() for pattern in SHARED_FILES for path in folder.rglob(pattern)})
    if dry_run:
        return files
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=list(SHARED_FILES))
    except Exception as error:  # whatever the Hub's client and its transport raise, by version
        advice = "log in with `hf auth login` or set HF_TOKEN"
        raise UserMistake(f"could not push to {repo_id}: {first_line(error)}; {advice}") from error
    return files

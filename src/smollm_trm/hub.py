"""Share a saved model: a card that states what was measured, and the upload."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from smollm_trm.models.storage import SETTINGS_FILE, read_notes, read_settings
from smollm_trm.records import first_line, write_json, write_text

PACKAGE = "smollm_trm"
UPLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "README.md")


def measured_lines(notes: Mapping[str, Any]) -> list[str]:
    """What `smollm_trm.json` holds of training and evaluation, as the card's bullet points."""
    lines = []
    training = notes.get("training", {})
    if training:
        split = training["split"]
        lines.append(
            f"trained on {training['train_rows']} problems of {split['source']} (split seed {split['seed']}, "
            f"fingerprint `{split['fingerprint'][:16]}`) for {training['optimizer_steps']} optimizer steps"
        )
        if training["dev_loss"] is not None:
            lines.append(f"dev loss {training['dev_loss']:.4f} nats per token on {training['dev_rows']} dev problems")
    for part, result in notes.get("evaluations", {}).items():
        low, high = result["interval"]
        lines.append(
            f"{part}: {100 * result['accuracy']:.1f}% of {result['total']} problems "
            f"(95% interval {100 * low:.1f} to {100 * high:.1f})"
        )
    return lines or ["nothing was measured yet"]


def model_card(folder: str | Path) -> str:
    """The card of a saved model as Markdown: what it is, what was measured, how to use it."""
    folder = Path(folder)
    settings = read_settings(folder)
    notes = read_notes(folder)
    span = (
        f"a latent span of {settings.num_latents} slots filled by the reasoner `{settings.reasoner}`"
        if settings.reasoner
        else "no latent span (the baseline)"
    )
    base = Path(settings.base).name or "a base of its own"
    header = {
        "base_model": settings.base,
        "library_name": "smollm-trm",
        "pipeline_tag": "text-generation",
        "tags": ["latent-reasoning", "trm", "peft"],
        "datasets": ["openai/gsm8k"],
    }
    if "/" not in settings.base or settings.base.startswith((".", "/")):
        del header["base_model"]  # a local folder means nothing on the Hub
    if "gsm8k" not in notes.get("training", {}).get("split", {}).get("source", ""):
        del header["datasets"]
    measured = "\n".join(f"- {line}" for line in measured_lines(notes))
    return (
        f"---\n{json.dumps(header, indent=2)}\n---\n\n"
        f"# Latent reasoning with {base}\n\n"
        f"{base} with {span}, base weights: {settings.base_training}, "
        f"target: {settings.target}.\n\n"
        f"## What was measured\n\n{measured}\n\nThe dev part may have picked the checkpoint; only a figure named "
        "`test` is the official test set.\n\n"
        f"## Use\n\n```python\nfrom {PACKAGE} import SmolLMv3WithTRM\n\n"
        'model = SmolLMv3WithTRM.from_pretrained("this/repository")\n'
        'print(model.generate_with_thinking("Tom has 3 bags of 4 apples. How many apples is that?"))\n```\n'
    )


def add_evaluation(folder: str | Path, part: str, result: Mapping[str, Any]) -> None:
    """Note an evaluation in a saved model's settings file, for its card.

    Args:
        folder: what `save_pretrained` wrote.
        part: "dev" or "test", with the arm's name if need be.
        result: what `evaluate_gsm8k` returned.
    """
    path = Path(folder) / SETTINGS_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: result[name] for name in ("accuracy", "correct", "total", "interval")}
    content.setdefault("evaluations", {})[part] = kept
    write_json(path, content)


def push_model(
    folder: str | Path, repo_id: str, *, private: bool = True, dry_run: bool = False, endpoint: str | None = None
) -> list[str]:
    """Write the card and upload a saved model.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: "owner/name" on the Hub.
        private: whether a new repository is private.
        dry_run: write the card and list the files, upload nothing.
        endpoint: another Hub than the public one.

    Returns:
        Names of the files.

    Raises:
        ValueError: not a saved model, or the Hub refused; one line.
    """
    folder = Path(folder)
    write_text(folder / "README.md", model_card(folder))
    files = sorted({path.relative_to(folder).as_posix() for pattern in UPLOADED for path in folder.rglob(pattern)})
    if dry_run:
        return files
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=list(UPLOADED))
    except Exception as error:  # whatever the Hub's client and its transport raise, by version
        raise ValueError(
            f"could not push to {repo_id}: {first_line(error)}; log in with `hf auth login` or set HF_TOKEN"
        ) from error
    return files

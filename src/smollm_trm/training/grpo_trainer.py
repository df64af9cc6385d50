"""GRPO: several answers to each problem are sampled, and those better than their group's mean become more likely.

TRL's `GRPOTrainer` on the model as it is. Ours is what it asks for and what a run here promises: the graded answer as
the reward, the problems from easy to hard, checkpoints that are whole or not there and hold only what is trained.

Source: Shao et al. 2024, *DeepSeekMath*, section 4. Left out: several devices, vLLM.
"""

import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import datasets
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import DynamicCache, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from trl import GRPOConfig, GRPOTrainer

from smollm_trm.bars import progress_bar
from smollm_trm.data.answers import annotations_in, gold_answer, is_correct
from smollm_trm.data.batching import pad_left
from smollm_trm.models.generation import ended_at
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake, remove_path, write_whole
from smollm_trm.training.checkpoints import checkpoints_by_step, reason_unread
from smollm_trm.training.grpo_settings import GRPOSettings
from smollm_trm.training.loggers import build_loggers, finish_wandb
from smollm_trm.training.optim import build_optimizer, build_schedule
from smollm_trm.training.run import Run
from smollm_trm.training.watch import gradient_norm

WEIGHTS, STATE = "weights.pt", "trainer_state.json"
TENSOR_FILES = (WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth")
REMEMBERED = 256  # samples that a success rate is about
SELDOM = 0.02  # weight of problems that are always solved, or never
NOT_FINITE_LIMIT = 10  # steps in a row


def steps_needed(answer: str) -> int:
    """How many steps a gold solution has: its calculator annotations, or else its lines."""
    return len(annotations_in(answer)) or len(answer.partition("####")[0].strip().splitlines())


class EasyToHard(Sampler[int]):
    """Which problems a step samples answers to, by the success rate of recent samples.

    A problem is as hard as its solution has steps. The fewest steps are open at first; the next number opens when the
    hardest one that is open is solved at a rate of `open_next_at`. Of what is open, a problem is drawn in proportion to
    p (1 - p), the variance of its rewards at success rate p: where all samples are right, or none, nothing is learned.

    Iterating gives every drawn index `samples` times, and a step's whole batch `repeats` times, as TRL wants them.
    """

    def __init__(
        self, levels: Sequence[int], *, problems: int, samples: int, repeats: int, open_next_at: float, seed: int
    ) -> None:
        self.levels, self.problems, self.samples, self.repeats = list(levels), problems, samples, repeats
        self.open_next_at, self.seed, self.step, self.steps = open_next_at, seed, 0, 0
        self.rates: dict[int, float] = {}

    def __len__(self) -> int:
        return self.steps * self.problems * self.samples * self.repeats

    def __iter__(self) -> Iterator[int]:
        for step in range(self.step, self.steps):
            weight_of = self.weights()
            weights = torch.tensor([weight_of[one] for one in self.levels])
            source = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            drawn = torch.multinomial(weights, min(self.problems, int((weights > 0).sum())), generator=source).tolist()
            batch = [drawn[at % len(drawn)] for at in range(self.problems) for _ in range(self.samples)]
            for _ in range(self.repeats):
                yield from batch

    def weights(self) -> dict[int, float]:
        """How often a problem of each number of steps is drawn, compared with others; 0 where it is not open."""
        known = sorted(set(self.levels))
        hardest = next((one for one in known if self.rates.get(one, 0.0) < self.open_next_at), known[-1])
        rates = {level: self.rates.get(level, 0.5) for level in known}
        return {level: (p * (1 - p) + SELDOM) * (level <= hardest) for level, p in rates.items()}

    def note(self, rewards: Mapping[int, Sequence[float]]) -> None:
        """Take in the rewards of a step, by the number of steps of their problems."""
        for level, found in rewards.items():
            mean, share = sum(found) / len(found), len(found) / (len(found) + REMEMBERED)
            self.rates[level] = share * mean + (1 - share) * self.rates.get(level, mean)


class RightAnswer:
    """The reward: 1 for an answer that is right by the flexible score, else 0. Tells the curriculum, and ends a run in
    which all samples are rewarded alike for too long."""

    __name__ = "right"

    def __init__(self, curriculum: EasyToHard, *, constant_limit: int) -> None:
        self.curriculum, self.constant_limit, self.constant = curriculum, constant_limit, 0

    def __call__(
        self, completions: list, answer: list[str], steps: list[int], log_metric: Any, **_: Any
    ) -> list[float]:
        rewards = [float(is_correct(one[0]["content"], gold)) for one, gold in zip(completions, answer, strict=True)]
        by_level = defaultdict(list)
        for level, reward in zip(steps, rewards, strict=True):
            by_level[level].append(reward)
        self.curriculum.note(by_level)
        for level, rate in self.curriculum.rates.items():
            log_metric(f"right_at_{level}_steps", rate)
        self.constant = self.constant + 1 if len(set(rewards)) == 1 else 0
        if self.constant == self.constant_limit:
            advice = "easier problems or a better model" if not rewards[0] else "harder problems"
            what = f"the reward of all samples was {rewards[0]:g} in {self.constant} steps in a row"
            raise UserMistake(f"{what}: there is nothing to learn from; give {advice}, or raise temperature")
        return rewards


class RunLogs(TrainerCallback):
    """A run's figures in our loggers, a bar, and gradients that are not finite left out, up to a limit."""

    def __init__(self, loggers: Sequence[Logger], *, progress: bool, advice: str) -> None:
        self.loggers, self.progress, self.advice, self.not_finite = loggers, progress, advice, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        count = {"total": args.max_steps, "initial": state.global_step, "unit": "step"}
        self.bar = progress_bar(**count, disable=not self.progress)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.not_finite = 0 if bool(torch.isfinite(gradient_norm(model))) else self.not_finite + 1
        if self.not_finite == NOT_FINITE_LIMIT:
            raise FloatingPointError(
                f"the gradients of {self.not_finite} steps in a row were not finite: {self.advice}"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
        figures = {name.replace("completions/", ""): float(one) for name, one in logs.items() if "/right/" not in name}
        figures["train_loss"] = figures.pop("loss", math.nan)
        if "reward" in figures:
            for one in self.loggers:
                one.log_metrics(figures, step=state.global_step - 1)
            self.bar.set_postfix_str(f"{100 * figures['reward']:.1f}% of samples right", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class LatentGRPOTrainer(GRPOTrainer):
    """TRL's trainer with the curriculum's problems and this package's checkpoints."""

    def __init__(self, *, curriculum: EasyToHard, **options: Any) -> None:
        self.curriculum = curriculum
        super().__init__(**options)

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine unasked."""

    def _get_train_sampler(self, dataset: Any = None) -> EasyToHard:
        self.curriculum.steps = self.args.max_steps
        return self.curriculum

    @torch.no_grad()
    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, fields: Any, n: int, *_: Any) -> Any:
        """Sample n answers to each prompt, which is read and thought about once; TRL would do so for every answer."""
        model = self.model.eval()
        ids, mask = (one.to(model.device) for one in pad_left(prompt_ids[::n], self._tokenizer.pad_token_id))
        given = {"latents": model.latents_for(ids, mask)} if model.use_trm else {}
        cache = DynamicCache(config=model.config.get_text_config())
        model.model(ids[:, :-1], mask[:, :-1], past_key_values=cache, use_cache=True, **given)
        cache.batch_repeat_interleave(n)
        each = {name: one.repeat_interleave(n, 0) for name, one in {**given, "attention_mask": mask}.items()}
        sampling = copy.deepcopy(model.generation_config)
        sampling.update(**self.generation_kwargs)
        inputs = ids.repeat_interleave(n, 0)
        written = model.generate(inputs, **each, past_key_values=cache, generation_config=sampling)
        model.train()
        return [ended_at(row, self.eos_token_ids) for row in written[:, ids.shape[1] :].tolist()], None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The same loss from fewer rows: equal samples are one with their advantages added, none has no advantage."""
        first: dict[tuple, int] = {}
        rows = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1).tolist()
        same = torch.tensor([first.setdefault(tuple(row), at) for at, row in enumerate(rows)])
        own = inputs["advantages"]
        summed = torch.zeros_like(own).index_add_(0, same.to(own.device), own)
        kept = summed != 0
        kept[0] |= ~kept.any()
        fewer = {**inputs, "advantages": summed}
        fewer = {name: one[kept] if isinstance(one, Tensor) and one.ndim else one for name, one in fewer.items()}
        return super()._compute_loss(model, fewer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write what changes, whole or not at all; keep two."""
        folder = Path(self.args.output_dir)
        self.state.stateful_callbacks["EasyToHard"] = self.curriculum.rates  # JSON makes the numbers of steps texts

        def write(temporary: Path) -> None:
            temporary.mkdir()
            torch.save({name: p for name, p in self.model.named_parameters() if p.requires_grad}, temporary / WEIGHTS)
            self._save_optimizer_and_scheduler(str(temporary))
            self._save_scaler(str(temporary))
            self._save_rng_state(str(temporary))
            self.state.save_to_json(str(temporary / STATE))

        write_whole(folder / f"step-{self.state.global_step}.ckpt", write)
        for _, stale in sorted(checkpoints_by_step(folder).items())[:-2]:
            remove_path(stale)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, own = Path(resume_from_checkpoint), dict(self.model.named_parameters())
        for name, saved in torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True).items():
            own[name].data.copy_(saved)
        state = read_state(folder)
        self.curriculum.step = state["global_step"]
        self.curriculum.rates = {int(level): one for level, one in state["stateful_callbacks"]["EasyToHard"].items()}


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def grpo_damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Tensors, plain values and NumPy's random state are read back."""
    try:
        for name in TENSOR_FILES:
            with ZipFile(path / name) as archive:
                broken = archive.testzip()
            if broken:
                return f"{name}: {broken} does not match its checksum"
            with safe_globals():
                torch.load(path / name, map_location="meta", weights_only=True)
        _ = read_state(path)["stateful_callbacks"]["EasyToHard"]
    except Exception as error:  # whatever a damaged file makes the reader raise
        return reason_unread(error)
    return None


def choose_trained(model: SmolLMv3WithTRM, train: str, where: str) -> None:
    """Let GRPO change the reasoner, the adapter, or both, and nothing else."""
    marks = {"reasoner": ".reasoner.", "lora": "lora_"}
    parts = {part: [one for name, one in model.named_parameters() if mark in name] for part, mark in marks.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for part in parts if train == "both" else [train]:
        if not parts[part]:
            others = [f"choose train={other!r}" for other in parts if parts[other]]
            there = others[0] if others else "train one by `smollm-trm train`"
            raise UserMistake(f"train={train!r}: {where} has no {'LoRA adapter' if part == 'lora' else part}; {there}")
        for parameter in parts[part]:
            parameter.requires_grad_(parameter.is_floating_point())


def fit_grpo(
    settings: GRPOSettings,
    run: Run,
    model: SmolLMv3WithTRM,
    rows: Sequence[Mapping[str, str]],
    *,
    checkpoint: Path | None,
    max_new_tokens: int,
    precision: str,
) -> None:
    """Train a model in place by the settings."""
    batch = min(settings.batch_size, settings.samples_per_step)
    repeats = settings.samples_per_step // batch
    columns = [{"prompt": [{"role": "user", "content": row["question"]}], "answer": gold_answer(row["answer"]),
                "steps": steps_needed(row["answer"])} for row in rows]  # fmt: skip
    curriculum = EasyToHard(
        [one["steps"] for one in columns],
        problems=settings.problems_per_step,
        samples=settings.samples_per_problem,
        repeats=repeats,
        open_next_at=settings.open_next_at,
        seed=settings.seed,
    )
    asked = GRPOConfig(
        str(run.checkpoints),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=repeats,
        num_generations=settings.samples_per_problem,
        max_completion_length=max_new_tokens,
        max_steps=settings.max_steps,
        temperature=settings.temperature,
        beta=0.0,  # no KL: TRL would load a second model
        gradient_checkpointing=settings.gradient_checkpointing,
        disable_dropout=True,  # samples and their probabilities are to be of one model
        bf16=precision == "bf16-mixed",
        fp16=precision == "16-mixed",
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        save_steps=settings.save_every_n_steps,
        logging_steps=1,
        report_to="none",
        log_level="error",
        disable_tqdm=True,
        ignore_data_skip=True,  # the curriculum knows where it was
    )
    base = [parameter for name, parameter in model.named_parameters() if ".reasoner." not in name]
    chosen = settings.optimizer_settings()
    optimizer = build_optimizer(base=base, reasoner=model.reasoner, settings=chosen)
    schedule = build_schedule(optimizer, total_steps=settings.max_steps, settings=chosen)
    first_step = read_state(checkpoint)["global_step"] if checkpoint else 0
    loggers = build_loggers(run.folder, first_step=first_step, wandb=run.wandb, seed=run.seed)
    generation = copy.deepcopy(model.generation_config)
    trainer = LatentGRPOTrainer(
        curriculum=curriculum,
        model=model,
        args=asked,
        train_dataset=datasets.Dataset.from_list(columns),
        processing_class=copy.deepcopy(model.tokenizer),
        reward_funcs=RightAnswer(curriculum, constant_limit=settings.constant_limit),
        optimizers=(optimizer, schedule),
        callbacks=[RunLogs(loggers, progress=run.progress, advice=run.not_finite)],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except torch.OutOfMemoryError as error:
        raise RuntimeError("out of memory: lower batch_size, then problems_per_step") from error
    finally:
        finish_wandb(loggers)
    del model.forward  # TRL's, on this object
    model.generation_config = generation
    model.eval()

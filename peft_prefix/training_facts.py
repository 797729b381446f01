"""Makes the record of a training out of what the `Trainer` tells its callbacks."""

from __future__ import annotations

import functools
import json
import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from transformers import TrainerState, TrainingArguments

from .training_record import (
    LONGEST_NAME,
    LONGEST_TEXT,
    MOST_VALUES,
    Curve,
    DataSet,
    Evaluation,
    TrainingRecord,
    Value,
    thinned,
)
from .version import __version__

_ALWAYS = ("seed", "weight_decay", "max_grad_norm")
_UNLESS_DEFAULT = ("label_smoothing_factor", "gradient_checkpointing", "torch_compile", "neftune_noise_alpha")
"""What is worth a line only where somebody asked for it."""
_FORMATS = "arrow audiofolder cache csv generator imagefolder json lance pandas parquet spark sql text webdataset xml"
"""Builders that read files, which say nothing about what data they are."""
_NO_METRICS = ("_runtime", "_per_second", "_compilation_time", "_num_tokens")
"""What evaluations log about themselves."""


def record_of(
    args: TrainingArguments,
    state: TrainerState,
    *,
    training_data: Any = None,
    evaluation_data: Any = None,
    optimizer: Any = None,
    kept_step: int | None = None,
    logs_of_training: int | None = None,
) -> TrainingRecord:
    """The record of a training up to now.

    Args:
        args: The training arguments.
        state: The trainer's state; its log knows the whole curve, also of a resumed training.
        training_data: The data set.
        evaluation_data: That of evaluations.
        optimizer: The optimizer that is used, which need not be the one that the arguments name.
        kept_step: The step whose numbers the prefix has, if it is not the last one.
        logs_of_training: How many entries the log had when the training ended. Later ones are about the numbers that
            the prefix had then, whatever step they name.
    """
    kept_step = state.global_step if kept_step is None else kept_step
    history: list[dict[str, Any]] = [log for log in state.log_history[:logs_of_training] if _has_step(log)]
    later = [] if logs_of_training is None else state.log_history[logs_of_training:]
    evaluations = _evaluations([*history, *({**log, "step": kept_step} for log in later)])
    best = state.best_global_step
    return TrainingRecord(
        hyperparameters=_hyperparameters(args, optimizer),
        training_data=_data_set(training_data),
        evaluation_data=_data_set(evaluation_data),
        steps=state.global_step,
        kept_step=kept_step,
        epochs=None if state.epoch is None else float(state.epoch),
        hardware=_hardware(args.device),
        num_processes=args.world_size,
        versions={
            "peft_prefix": __version__,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
        training_losses=_curve((log["step"], log.get("loss")) for log in history),
        evaluation_losses=_curve((log["step"], log.get("eval_loss")) for log in history),
        last_evaluation=evaluations[max(evaluations)] if evaluations else None,
        best_evaluation=evaluations.get(best) if best else None,
    )


def _hyperparameters(args: TrainingArguments, optimizer: Any) -> dict[str, Value]:
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    found: dict[str, Any] = {
        "learning_rate": args.learning_rate,
        "train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "total_train_batch_size": batch,
        **({"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}),
        "optimizer": args.optim,
        "optimizer_args": args.optim_args,
        "lr_scheduler_type": args.lr_scheduler_type,
        "lr_scheduler_kwargs": args.lr_scheduler_kwargs,
        "warmup_steps": args.warmup_steps,
        **{name: getattr(args, name) for name in _ALWAYS},
        "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
        **{name: getattr(args, name) for name in _UNLESS_DEFAULT if getattr(args, name)},
        **_of_optimizer(optimizer),
    }
    # PrefixBankTrainer clips each prefix for itself, and tells the Trainer to clip nothing.
    if hasattr(args, "max_grad_norm_of_each_prefix"):
        found["max_grad_norm"] = args.max_grad_norm_of_each_prefix
    return {name: _plain(value) for name, value in found.items() if value not in (None, "", {})}


def _of_optimizer(optimizer: Any) -> dict[str, Any]:
    """What an optimizer says about itself, which is right for one that a user made, too."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate stands around it
    groups = getattr(optimizer, "param_groups", None)
    if not groups:
        return {}
    # A scheduler leaves the peak in "initial_lr".
    rates = sorted({float(group.get("initial_lr", group["lr"])) for group in groups if "lr" in group}, reverse=True)
    decays = [float(group["weight_decay"]) for group in groups if "weight_decay" in group]
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    if rates:
        found["learning_rate"] = rates[0] if len(rates) == 1 else ", ".join(f"{rate:g}" for rate in rates)
    if decays:
        found["weight_decay"] = max(decays)
    return found | {name: str(groups[0][name]) for name in ("betas", "eps", "momentum") if groups[0].get(name)}


def _plain(value: Any) -> Value:
    value = getattr(value, "value", value)  # of an enumeration
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    if isinstance(value, (bool, int, float)):
        return value
    return _text(json.dumps(value, default=str) if isinstance(value, (Mapping, list, tuple)) else str(value))


def _text(value: Any) -> str | None:
    """A string as records have them."""
    if value is None:
        return None
    return "".join(one if one.isprintable() else " " for one in str(value)[:LONGEST_TEXT])


def _data_set(data: Any) -> DataSet | None:
    """What a data set says about itself: its length, and more if it is one of the package `datasets`."""
    if data is None:
        return None
    try:
        examples = len(data)
    except TypeError:  # a stream
        examples = None
    name = _name_of_data(data)
    if name is None:
        return DataSet(examples=examples)
    return DataSet(
        name=_text(name),
        config=_text(getattr(data, "config_name", None)),
        split=_text(getattr(data, "split", None)),
        examples=examples,
    )


def _name_of_data(data: Any) -> str | None:
    sources = getattr(getattr(data, "info", None), "download_checksums", None)
    for source in sources if isinstance(sources, Mapping) else ():
        if match := re.match(r"hf://datasets/([^@]+)@", str(source)):
            return match.group(1)
    name = getattr(data, "builder_name", None)
    return name if isinstance(name, str) and name not in _FORMATS.split() else None


def _curve(points: Iterable[tuple[int, Any]]) -> Curve:
    """Finite losses, one for each step: a step that was logged again counts as it was logged last."""
    found = {step: float(loss) for step, loss in points if _is_number(loss)}
    return thinned(sorted(found.items()))


def _evaluations(history: list[dict[str, Any]]) -> dict[int, Evaluation]:
    """The evaluations by step; those of several data sets are one."""
    found: dict[int, dict[str, float]] = {}
    for log in history:
        metrics = {
            name.removeprefix("eval_"): float(value)
            for name, value in log.items()
            if name.startswith("eval_") and not name.endswith(_NO_METRICS) and _is_number(value)
        }
        if metrics:
            found.setdefault(log["step"], {}).update(metrics)
    return {
        step: Evaluation(
            step=step,
            metrics=dict([item for item in metrics.items() if _is_name(item[0])][: MOST_VALUES // 2]),
        )
        for step, metrics in found.items()
    }


def _has_step(log: Mapping[str, Any]) -> bool:
    return isinstance(log.get("step"), int)


def _is_name(name: str) -> bool:
    return 0 < len(name) <= LONGEST_NAME and name.isascii() and name.isprintable()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _hardware(device: torch.device) -> str | None:
    if device.type == "cuda":
        return _text(torch.cuda.get_device_name(device))
    return _text(_processor() if device.type == "cpu" else device.type)


@functools.cache
def _processor() -> str:
    """Name of the processor: Linux has it in a file, other systems where Python finds it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""Training a method: the stock Trainer with checkpoints, and the dev loss per token beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from paper.methods import Adapted
from paper.methods.method import Row
from paper.processes import processes
from paper.settings import Training
from paper.yaml_files import SettingError
from peft_prefix import PromptTargetCollator, last_checkpoint
from peft_prefix.prompt_target import IGNORED

EVALUATION_ROWS = 16


class BatchError(ValueError):
    """The rows of a batch cannot be shared evenly. The message says how to start the run instead."""


def train(
    adapted: Adapted,
    training: Training,
    train_rows: Sequence[Row],
    dev_rows: Sequence[Row],
    collate: PromptTargetCollator,
    folder: Path,
    seed: int,
    accumulation: int = 1,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train, or go on from the last whole checkpoint in `folder`.

    Args:
        adapted: What is trained; holds the chosen weights afterwards.
        training: How.
        train_rows: Rows to learn.
        dev_rows: Rows that the dev loss is measured on.
        collate: Makes batches.
        folder: For checkpoints.
        seed: Of the order of the rows.
        accumulation: Parts that each process divides its share of a batch into, to need less memory.
        callbacks: Further callbacks of the Trainer.

    Returns:
        `curve` (dev loss in nats per target token after some steps), `dev_loss` of the weights that were kept,
        `steps`, and `seconds` with all measuring and saving, which is `None` after an interruption.
    """
    arguments = _arguments(training, len(train_rows), folder, seed, accumulation)
    ordered = sorted(map(collate.encode, dev_rows), key=lambda row: len(row["input_ids"]))
    trainer = _Trainer(
        model=adapted.model,
        args=arguments,
        train_dataset=[collate.encode(row) for row in train_rows],
        eval_dataset=ordered,
        data_collator=collate,
        callbacks=[_MeasureAtTheEnd(), *callbacks],
    )
    checkpoint = last_checkpoint(folder)
    started = time.perf_counter()
    trainer.train_from(checkpoint)
    seconds = None if checkpoint else round(time.perf_counter() - started, 1)
    # Without the mixed precision of training, so that texts do not depend on whether this process has trained.
    trainer.accelerator.unwrap_model(adapted.model, keep_fp32_wrapper=False)
    curve = [
        {"step": one["step"], "dev_loss": one["eval_loss"]} for one in trainer.state.log_history if "eval_loss" in one
    ]
    losses = [one["dev_loss"] for one in curve]
    return {
        "curve": curve,
        "dev_loss": min(losses) if training.select == "best" else losses[-1],
        "steps": trainer.state.global_step,
        "seconds": seconds,
    }


def _arguments(training: Training, rows: int, folder: Path, seed: int, accumulation: int) -> TrainingArguments:
    """The Trainer's arguments; `batch_size` is shared by all processes."""
    places = processes().num_processes * accumulation
    if training.batch_size % places:
        raise BatchError(
            f"A batch of {training.batch_size} rows cannot be divided into {places} equal parts (processes times "
            "accumulation). Choose a number of processes and an accumulation that divide it; one process always does."
        )
    steps = steps_of(training, rows)
    every = math.ceil(steps / training.evaluations)
    is_best = training.select == "best"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size // places,
        gradient_accumulation_steps=accumulation,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=1.0,
        bf16=training.bf16,
        use_cpu=not torch.accelerator.is_available(),  # bfloat16 on a CPU wants to be asked for
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every if is_best else min(every, 500),
        save_total_limit=2 if is_best else 1,
        load_best_model_at_end=is_best,
        logging_strategy="steps",
        logging_steps=every,
        report_to="none",
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    wanted = "bf16" if training.bf16 else "no"
    if arguments.mixed_precision != wanted:
        raise SettingError(
            f"The settings train with mixed precision {wanted!r}, and accelerate's configuration asks for "
            f"{arguments.mixed_precision!r}. Start with accelerate launch --mixed_precision {wanted}."
        )
    if arguments.n_gpu > 1:
        raise SettingError(
            f"One process with {arguments.n_gpu} GPUs would train with other batches than the settings say. Start one "
            "process for each with accelerate launch, or choose one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    return arguments


def steps_of(training: Training, rows: int) -> int:
    """Optimizer steps; the last batch of an epoch may be smaller."""
    return training.steps or max(1, round(math.ceil(rows / training.batch_size) * (training.epochs or 0)))


class _MeasureAtTheEnd(TrainerCallback):
    """The Trainer measures every so many steps only, which the last need not be one of."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after the last step."""
        control.should_evaluate |= state.global_step >= state.max_steps


class _Trainer(Trainer):
    """Measures the dev loss over tokens, as the mean over batches would weigh tokens of short batches more."""

    def train_from(self, checkpoint: str | None) -> None:
        """Train to the end; one that stopped between its last step and its end needs its weights only."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            if state.global_step >= self.args.max_steps:
                self.state = state
                self._load_from_checkpoint(state.best_model_checkpoint or checkpoint)
                return
        self.train(resume_from_checkpoint=checkpoint)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The dev loss in nats per target token; every process measures its share."""
        model: Any = self.model
        collate: Any = self.data_collator
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        total, tokens = 0.0, 0.0
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        is_training = model.training
        model.eval()
        for start in range(0, len(rows), EVALUATION_ROWS * count):
            share = rows[start + rank * EVALUATION_ROWS :][:EVALUATION_ROWS]
            # A process without a share calls the model too: others may wait for its part of a sharded base.
            batch = self._prepare_inputs(collate(share or rows[:1]))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = model(**batch).loss
            if share:
                labels = batch["labels"] if model.config.is_encoder_decoder else batch["labels"][:, 1:]
                labelled = int((labels != IGNORED).sum())
                total, tokens = total + float(loss) * labelled, tokens + labelled
        model.train(is_training)
        if count > 1:
            sums = torch.tensor([total, tokens], dtype=torch.float64, device=self.args.device)
            total, tokens = self.accelerator.reduce(sums).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

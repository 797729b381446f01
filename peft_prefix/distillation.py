"""Context distillation: a prefix learns to stand for a long text that its base has read."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional
from transformers import Trainer

from .adapters import trained_adapters
from .context_teacher import ContextTeacher
from .errors import IncompatibleBaseError, PrefixConfigError, name_of
from .fingerprint import difference, weights_fingerprint
from .label_logits import labelled_logits
from .labelled_batch import LabelledBatch
from .model import PrefixModel
from .teacher_store import StoredTeacher


class PrefixDistillationTrainer(Trainer):
    """A `Trainer` whose loss is how far the base with its prefix is from the base that has read a context.

    The student reads rows without the context. At each labelled position the loss is the Kullback-Leibler divergence
    from the teacher's next token to the student's, over the teacher's most likely tokens and one class for all others
    (`top_k` of the teacher). It is a mean over the labelled positions of all batches that make a step. What a label
    says counts only with `label_weight`.

    An evaluation gives `eval_loss`, the mean divergence at temperature 1 over all labelled positions, and
    `eval_top1_agreement`, the share of them where the most likely token of both is the same. Everything else is as in
    the `Trainer`: the active prefix is trained, or with a column `prefix_names` those of the rows.

    Args:
        model: The model with the prefix.
        args: As in the `Trainer`.
        *more: As in the `Trainer`.
        teacher: A `ContextTeacher`, which reads along in each step, or a `StoredTeacher`.
        temperature: Flattens, above 1, what both say before they are compared; the loss is multiplied by its square.
            With `top_k` it acts on the classes that are compared.
        label_weight: Share of the ordinary cross-entropy with the labels in the loss, from 0 to below 1.
        **options: As in the `Trainer`.

    Raises:
        PrefixConfigError: The model is no `PrefixModel` of a language model, there is no teacher, a value cannot be, or
            something else would compute the loss.
        IncompatibleBaseError: The teacher is another base.

    Example:
        >>> teacher = ContextTeacher(model, document, tokenizer)  # doctest: +SKIP
        >>> trainer = PrefixDistillationTrainer(  # doctest: +SKIP
        ...     model, args, train_dataset=data, data_collator=collator, teacher=teacher
        ... )
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        teacher: ContextTeacher | StoredTeacher | None = None,
        temperature: float = 1.0,
        label_weight: float = 0.0,
        **options: Any,
    ) -> None:
        if not isinstance(model, PrefixModel):
            raise PrefixConfigError("PrefixDistillationTrainer trains a PrefixModel: make it with get_prefix_model.")
        if not isinstance(teacher, (ContextTeacher, StoredTeacher)):
            raise PrefixConfigError(
                f"teacher must be a ContextTeacher or a StoredTeacher, not {teacher!r:.100}: "
                "teacher=ContextTeacher(model, document, tokenizer)."
            )
        if not _is_number(temperature) or not 0 < temperature < math.inf:
            raise PrefixConfigError(f"temperature must be a number above 0, not {temperature!r}.")
        if not _is_number(label_weight) or not 0 <= label_weight < 1:
            raise PrefixConfigError(f"label_weight must be a number from 0 to below 1, not {label_weight!r}.")
        super().__init__(model, args, *more, **options)
        self.teacher = teacher
        self.temperature = float(temperature)
        self.label_weight = float(label_weight)
        self._is_encoder_decoder = bool(model.base.config.is_encoder_decoder)
        self._seen = _Seen()
        self._require_own_loss(model)
        self._require_same_base(model)
        # The loss below counts items, whatever the base's own loss does.
        self.model_accepts_loss_kwargs = True

    def _require_own_loss(self, model: PrefixModel) -> None:
        """Check that nothing else has a say in the loss, and that the teacher can be run beside it.

        Raises:
            PrefixConfigError: It is not so.
        """
        spread = self.is_deepspeed_enabled or self.is_fsdp_enabled
        is_live = isinstance(self.teacher, ContextTeacher)
        reasons = {
            "is for language models": not model.can_generate(),
            "has a loss of its own: leave compute_loss_func out": self.compute_loss_func is not None,
            "compares with a teacher and smooths no labels: leave label_smoothing_factor out": self.label_smoother,
            "computes its loss from logits: leave use_liger_kernel out": self.args.use_liger_kernel,
            "runs in one process for each device, without torch.nn.DataParallel: use accelerate launch": (
                self.args.n_gpu > 1
            ),
            "cannot run a teacher on a base that is spread over processes: store its targets before, with "
            "teacher.store(...), and give StoredTeacher(folder)": is_live and spread,
            "has a teacher that must not change, and adapters in its base are trained: freeze them, or store its "
            "targets before, with teacher.store(...)": is_live and trained_adapters(model.base),
        }
        for reason, applies in reasons.items():
            if applies:
                raise PrefixConfigError(f"PrefixDistillationTrainer {reason}.")

    def _require_same_base(self, model: PrefixModel) -> None:
        """Check that teacher and student are the same base.

        Raises:
            IncompatibleBaseError: They are not.
        """
        if isinstance(self.teacher, StoredTeacher):
            self.teacher.require_base(model.base)
            return
        teaching = self.teacher.model.base
        if teaching is model.base:
            return
        other = difference(self.teacher.base_fingerprint, weights_fingerprint(model.base))
        if bool(teaching.config.is_encoder_decoder) is not self._is_encoder_decoder:
            other = "is of another kind"
        if other is not None:
            raise IncompatibleBaseError(
                f"The teacher is {name_of(teaching)}, and the base of the model to be trained, {name_of(model.base)}, "
                f"{other}. Make the teacher with the model that is trained: ContextTeacher(model, ...)."
            )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next step and the number of their labelled positions, in all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = sum(int(LabelledBatch.of(batch, self._is_encoder_decoder).counts.sum()) for batch in batches)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            count = sum(gather_object([count]))
        return batches, torch.tensor(count, device=self.args.device) if batches else None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The divergence from the teacher to the student, per labelled position.

        Args:
            model: The student, as accelerate has wrapped it.
            inputs: A batch.
            return_outputs: Whether to return the student's output, too.
            num_items_in_batch: By how many labelled positions to divide; those of the batch if left out.
        """
        labelled = LabelledBatch.of(inputs, self._is_encoder_decoder)
        targets = self.teacher.targets(inputs)
        outputs = model(**{**inputs, "labels": labelled.labels, "return_dict": True})
        logits = labelled_logits(outputs["logits"], labelled.labels, labelled.shift)
        if not model.training:
            divergence = targets.divergence(logits).sum()
            agreed = (logits.argmax(dim=-1) == targets.top_tokens).sum()
            self._seen.add(float(divergence), int(agreed), len(logits))
            loss = divergence / max(len(logits), 1)
        else:
            loss = targets.divergence(logits, self.temperature).sum() * self.temperature**2
            if self.label_weight:
                entropy = functional.cross_entropy(logits.float(), labelled.targets, reduction="sum")
                loss = (1 - self.label_weight) * loss + self.label_weight * entropy
            counted = len(logits) if num_items_in_batch is None else num_items_in_batch
            loss = loss / torch.as_tensor(counted, device=loss.device).clamp(min=1)
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # by which gradients are averaged afterwards
        outputs["loss"] = loss
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the `Trainer`'s, with means over labelled positions instead of batches."""
        outer, self._seen = self._seen, _Seen()
        try:
            result: Any = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            seen = self._seen
        finally:
            self._seen = outer
        if self.accelerator.num_processes > 1:
            seen = _Seen(*map(sum, zip(*gather_object([seen.numbers]), strict=True)))
        if seen.count:
            result.metrics[f"{metric_key_prefix}_loss"] = seen.divergence / seen.count
            result.metrics[f"{metric_key_prefix}_top1_agreement"] = seen.agreed / seen.count
        return result


class _Seen:
    """What an evaluation has seen so far.

    Args:
        divergence: Sum over labelled positions.
        agreed: At how many of them both have the same most likely token.
        count: How many there were.
    """

    def __init__(self, divergence: float = 0.0, agreed: int = 0, count: int = 0) -> None:
        self.divergence, self.agreed, self.count = divergence, agreed, count

    @property
    def numbers(self) -> tuple[float, int, int]:
        """All three, to be sent to other processes."""
        return self.divergence, self.agreed, self.count

    def add(self, divergence: float, agreed: int, count: int) -> None:
        """A batch."""
        self.divergence += divergence
        self.agreed += agreed
        self.count += count


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

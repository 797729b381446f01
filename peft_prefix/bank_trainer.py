"""Training many prefixes in the same batches, each as if it were alone."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer

from .adapters import trained_adapters
from .errors import PrefixConfigError, PrefixInputError
from .model import PrefixModel
from .prefix_names import COLUMN
from .prompt_target import IGNORED


class PrefixBankTrainer(Trainer):
    """A `Trainer` for mixed batches in which no prefix learns anything about the data of another.

    With the stock `Trainer`, prefixes of one batch meet in two places: the loss is a mean over the tokens of all rows,
    and gradients are clipped by their norm over all parameters. Here each prefix's gradient is that of the mean over
    its own target tokens, and `max_grad_norm` is about each prefix for itself. What a prefix becomes then depends on
    its own rows (and on the learning rate's schedule). In batches of the same shape that holds bit for bit; where other
    rows change the shape (rows, tokens, labels, the longest prefix), kernels may round differently.

    The rows of the data set name their prefixes in a column `prefix_names`; see `PrefixNamesCollator` and
    `PromptTargetCollator`. Everything else is as in the `Trainer`, also the loss that is logged.

    Args:
        model: The model with the prefixes.
        args: As in the `Trainer`.
        *more: As in the `Trainer`.
        **options: As in the `Trainer`.

    Raises:
        PrefixConfigError: The model is no `PrefixModel` of a language model, or losses or gradients of prefixes cannot
            be told apart: with DeepSpeed, `torch.nn.DataParallel`, a loss function of one's own, adapters that are
            trained, experts that are balanced, or smoothed labels where the base's loss does not count tokens.
    """

    def __init__(self, model: Any = None, args: Any = None, *more: Any, **options: Any) -> None:
        if not isinstance(model, PrefixModel):
            raise PrefixConfigError("PrefixBankTrainer trains a PrefixModel: make it with get_prefix_model.")
        super().__init__(model, args, *more, **options)
        self._config: Any = model.base.config
        self._require_separate_losses(model)
        self._largest_norm = self.args.max_grad_norm
        self.args = copy.copy(self.args)
        self.args.max_grad_norm = 0.0  # all prefixes together would be clipped
        vars(self.args)["max_grad_norm_of_each_prefix"] = self._largest_norm  # for the record of the training
        self._bank = model.prefixes
        self._targets: Counter[str] = Counter()
        self._norm = 0.0
        self._watched: Any = None

    def _require_separate_losses(self, model: PrefixModel) -> None:
        """Check that the loss is a sum over target tokens, of which each is about one prefix.

        Raises:
            PrefixConfigError: It is not, or something else computes it.
        """
        balanced = getattr(model.base.config.get_text_config(decoder=True), "output_router_logits", False)
        smoothed = self.label_smoother is not None and not self.model_accepts_loss_kwargs
        reasons = {
            "runs in one process for each device, without DeepSpeed and torch.nn.DataParallel, which keep gradients to "
            "themselves: use accelerate launch": self.is_deepspeed_enabled or self.args.n_gpu > 1,
            "does not train adapters in the base, which learn from all rows: freeze them": trained_adapters(model.base),
            "is for language models, whose loss is about tokens": not model.can_generate(),
            "uses the loss of the model: leave compute_loss_func out": self.compute_loss_func is not None,
            f"does not smooth labels for {type(model.base).__name__}, whose loss does not count tokens": smoothed,
            "does not balance experts, which all rows share: set output_router_logits=False in the config": balanced,
        }
        for reason, applies in reasons.items():
            if applies:
                raise PrefixConfigError(f"PrefixBankTrainer {reason}. Or use the stock Trainer.")

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of the next step, as the `Trainer`'s."""
        self._targets = Counter()  # what a step that was skipped or failed has counted is void
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, of the sum over all target tokens.

        Raises:
            PrefixInputError: The batch does not say which prefix each row has, or has no labels.
        """
        if COLUMN not in inputs or "labels" not in inputs:
            raise PrefixInputError(
                f"The batch has no {COLUMN!r} or no 'labels', but {', '.join(inputs)}. The data set needs a column "
                f"{COLUMN!r}, and a collator that keeps it: PrefixNamesCollator or PromptTargetCollator."
            )
        entries = [None if name is None else self._bank.entry(name) for name in inputs[COLUMN]]
        targets = self._targets_of(inputs)
        for entry, count in zip(entries, targets.tolist(), strict=True):
            if entry is not None:
                self._targets[entry.name] += count
        self._watch(self.optimizer)
        one = torch.ones((), device=targets.device)
        if any(entry is not None and entry.is_trained for entry in entries):
            loss = super().training_step(model, inputs, one)
        else:
            loss = self._nothing_to_learn(model, inputs, one)
        if num_items_in_batch is None:
            num_items_in_batch = max(int(targets.sum()), 1) * self.current_gradient_accumulation_steps
        return torch.div(loss, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the `Trainer`'s; `grad_norm` is the largest norm of a prefix in the last step, before it was clipped."""
        if "grad_norm" in logs:
            logs["grad_norm"] = self._norm
        super().log(logs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss; in training the sum over target tokens, whatever the base's loss counts."""
        if not model.training or self.model_accepts_loss_kwargs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        total = self._targets_of(inputs).sum()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * total * self.current_gradient_accumulation_steps  # by which it is divided afterwards

    def _watch(self, optimizer: Any) -> None:
        """Separate prefixes before each step of an optimizer, whoever made it."""
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate stands around it
        if inner is not self._watched:
            inner.register_step_pre_hook(lambda *_: self._separate())
            self._watched = inner

    def _targets_of(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """How many tokens each row's loss is about, `(batch,)`."""
        labels = inputs["labels"]
        learned = labels if self._config.is_encoder_decoder else labels[:, 1:]
        return learned.ne(IGNORED).sum(dim=1)  # type: ignore[no-any-return]

    def _nothing_to_learn(self, model: nn.Module, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
        """The loss of a batch whose rows train no prefix."""
        if self.accelerator.num_processes > 1:
            raise PrefixInputError(
                "No row of this process's batch names a prefix that is trained, and the other processes would wait for "
                "its gradients. Leave out rows that train nothing, or use one process."
            )
        model.train()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=items)
        return loss

    def _separate(self) -> None:
        """Make each prefix's gradient that of its own mean, and clip it by its own norm."""
        targets = self._targets
        if self.accelerator.num_processes > 1:
            targets = sum((Counter(one) for one in gather_object([dict(targets)])), Counter())
        summed = self.model_accepts_loss_kwargs and self.args.average_tokens_across_devices
        processes = 1 if summed else self.accelerator.num_processes
        norms = [torch.zeros(())]
        for name, count in targets.items():
            own = [one for one in self._bank[name].parameters() if one.grad is not None]
            for parameter in own:
                assert parameter.grad is not None
                parameter.grad.mul_(processes / max(count, 1))
            if own:
                norms.append(nn.utils.clip_grad_norm_(own, self._largest_norm or math.inf).cpu())
        self._norm = float(torch.stack(norms).max())

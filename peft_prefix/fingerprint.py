"""Telling two models of the same shape apart by a small sample of their weights."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from .adapters import base_parameters
from .placement import repeated_names, weight_of
from .processes import is_sharded

_FIELDS = 3
"""Parts of the fingerprint of the base's own weights, or of an adapter's."""


def weights_fingerprint(base: PreTrainedModel, without: Iterable[str] = ()) -> str | None:
    """A short sample of the base's weights, enough to tell two models of the same shape apart.

    Four numbers of each of up to 64 weight matrices, spread over the model, with their dtype and a hash of the
    matrices' names. The same again for the adapters that act in it, if there are any; their names do not count. `None`
    where weights cannot be read: not materialized, sharded over processes, or quantized.

    Args:
        base: The base model.
        without: Names of modules to leave out: a prefix brings its own weights for them, and a fresh head is another
            one each time.
    """
    left_out = tuple(f"{name}." for name in without)
    everything = list(base_parameters(base))
    # Only what is put aside has hidden that it is another one; a bank asks for the fingerprint with each prefix.
    repeated = repeated_names(base) if any(one.parameter.is_meta for one in everything) else ()
    matrices = [
        one
        for one in everything
        if one.acts
        and one.parameter.dim() >= 2
        and one.parameter.is_floating_point()
        and not one.plain_name.startswith(left_out)
        and one.name not in repeated
    ]
    if getattr(base, "hf_quantizer", None) is not None:
        return None
    own, adapters = (
        _sample(base, [(one.plain_name, one.parameter) for one in matrices if one.in_adapter is in_adapter])
        for in_adapter in (False, True)
    )
    if own is None or (adapters is None and any(one.in_adapter for one in matrices)):
        return None
    return own if adapters is None else f"{own}:{adapters}"


def same_weights(one: str | None, other: str | None) -> bool:
    """Whether two fingerprints may come from the same weights, loaded in the same precision or in different ones.

    A missing fingerprint may come from any weights.
    """
    return difference(one, other) is None


def difference(trained: str | None, now: str | None) -> str | None:
    """What is another one in a base than where a prefix was trained, as a part of a sentence; `None` for nothing.

    Args:
        trained: Fingerprint of the base that the prefix was trained on.
        now: Fingerprint of the base at hand.
    """
    if trained is None or now is None:
        return None
    (own, *adapter), (own_now, *adapter_now) = _parts(trained), _parts(now)
    if not _same(own, own_now):
        return "has the same shape with other weights"
    if adapter and not adapter_now:
        return "is without the adapter that acted beside it (load that first; see PEFT)"
    if adapter_now and not adapter:
        return "has an adapter that did not act when it was trained"
    if adapter and not _same(adapter[0], adapter_now[0]):
        return "has another adapter than the one that it was trained beside, or another state of it"
    return None


def _sample(base: PreTrainedModel, matrices: list[tuple[str, torch.Tensor]]) -> str | None:
    if not matrices:
        return None
    matrices = sorted(matrices, key=lambda one: one[0])
    count = min(64, len(matrices))
    chosen = [weight_of(base, matrices[i * len(matrices) // count][1]).detach() for i in range(count)]
    # Those that are quantized in place or sharded are tensors of classes of their own.
    own_class = any(type(weight) is not torch.Tensor or is_sharded(weight) for weight in chosen)
    if own_class or any(weight.is_meta or weight.numel() == 0 for weight in chosen):
        return None
    numbers = [weight.flatten()[weight.numel() * k // 8] for weight in chosen for k in (1, 3, 5, 7)]
    sample = torch.stack([number.to("cpu", torch.float32) for number in numbers])
    names = hashlib.sha256(" ".join(name for name, _ in matrices).encode()).hexdigest()[:8]
    dtype = str(chosen[0].dtype).removeprefix("torch.")
    return f"{dtype}:{names}:{base64.b64encode(sample.numpy().tobytes()).decode()}"


def _parts(fingerprint: str) -> list[tuple[str, ...]]:
    """That of the base's own weights, and that of its adapters if there is one."""
    fields = fingerprint.split(":")
    return [tuple(fields[place : place + _FIELDS]) for place in range(0, len(fields), _FIELDS)]


def _same(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    (dtype, names, sample), (other_dtype, other_names, other_sample) = one, other
    if names != other_names:
        return False
    left, right = (
        torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32) for text in (sample, other_sample)
    )
    if dtype == other_dtype:
        return torch.equal(left, right)
    # Two roundings of the same number differ by one step of the coarser precision at most.
    return left.shape == right.shape and torch.allclose(left, right, rtol=2**-7, atol=2**-24)

"""Prefixes as the paper's own implementation keeps them (Li & Liang 2021, github.com/XiangLi1999/PrefixTuning).

Its GPT-2 part (`gpt2/train_control.py`) has an embedding `wte` of `p` rows and a network `control_trans` of linear
layers with tanh between them; the output for each virtual token is, layer by layer, a key and a value of all heads.
Text starts at position `p`, as here. Its checkpoints are pickles, which this library never opens, so the caller brings
the state dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from .config import PrefixConfig
from .errors import IncompatibleBaseError, PrefixInputError, some_of
from .geometry import Geometry
from .parameterization import PrefixTensors
from .peft_layout import SITE, PeftLayout

_OWN = re.compile(r"(?P<around>(?:\w+\.)*?)(?P<own>(?:wte|control_trans)\w*(?:\.\d{1,3})?(?:\.(?:weight|bias))?)")
"""A parameter of the prefix inside of whatever the trainer put around it."""
_FROZEN = {"transformer", "lm_head"}
"""Parts of the GPT-2 that some trainers save along."""
_NETWORK = re.compile(r"control_trans\.\d+\.(?:weight|bias)")


def read_original(state_dict: Mapping[str, torch.Tensor], geometry: Geometry) -> tuple[PrefixConfig, PrefixTensors]:
    """The keys and values of a prefix that was trained with the paper's own code for GPT-2.

    Read are the standard form (`wte`, and a `control_trans` of two linear layers), the deep one (three, `deep_param`),
    and that without a network (`init_shallow`: `control_trans` itself is the prefix, in a row or as a cache of words).
    The numbers are computed in float32, once. How the prefix started and its dropout are not in the state dict.

    Args:
        state_dict: `torch.load("pytorch_model.bin", weights_only=True)`, or a converted one. Weights of the frozen
            GPT-2 in it are passed over, and so is what stands before all names (`model.`, `module.`).
        geometry: Geometry of the base, at all sites.

    Returns:
        The configuration, with the site `decoder` alone, and keys and values `(H, p, D)` by name, in float32.

    Raises:
        PrefixInputError: The state dict is of another variant of the code, whose name is told, or contains NaN.
        IncompatibleBaseError: The base has other layers, heads or widths.

    Example:
        >>> from peft_prefix.geometry import LayerGeometry
        >>> state = {"wte.weight": torch.ones(5, 8)}
        >>> for index, width in (0, 3), (2, 32):
        ...     linear = torch.nn.Linear(8 if index == 0 else 3, width)
        ...     state |= {f"control_trans.{index}.{name}": one for name, one in linear.named_parameters()}
        >>> config, tensors = read_original(state, Geometry({"decoder": (LayerGeometry(2, 4, 4),) * 2}))
        >>> config.num_virtual_tokens, tensors["decoder.layers.1.value"].shape
        (5, torch.Size([2, 5, 4]))
    """
    own = _own_parameters(state_dict)
    layout = _layout(geometry)
    rows = _prefix_itself(own["control_trans"], layout) if "control_trans" in own else _rows(own, layout)
    if not torch.isfinite(rows).all():
        raise PrefixInputError(
            "The prefix of this state dict contains NaN or infinity: its training diverged. Take an earlier checkpoint."
        )
    config = PrefixConfig(num_virtual_tokens=len(rows), init="normal", sites=(SITE,), modules_to_save=())
    return config, layout.tensors(rows)


def _own_parameters(state_dict: Mapping[str, torch.Tensor]) -> PrefixTensors:
    """The prefix's own parameters, in float32 on the CPU, by the names that they have in the paper's code.

    Raises:
        PrefixInputError: They are not all there, or of another variant.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise PrefixInputError(
            "A state dict is a dictionary of tensors by name: torch.load(file, weights_only=True), or its 'state_dict'."
        )
    names = [name for name in state_dict if not _FROZEN & set(name.split("."))]
    matches = {name: _OWN.fullmatch(name) for name in names}
    unknown = [name[:80] for name, match in matches.items() if match is None]
    found = {match["own"]: name for name, match in matches.items() if match is not None}
    if unknown or not found or len({match["around"] for match in matches.values() if match is not None}) != 1:
        raise PrefixInputError(
            f"This is no state dict of the paper's code for GPT-2: it has {some_of(unknown or names) or 'no names'}, "
            "where wte.weight and control_trans.0.weight are expected."
        )
    variant = _other_variant(set(found))
    if variant is not None:
        raise PrefixInputError(f"This state dict cannot be read: {variant}.")
    wrong = [name for name in found.values() if not _is_number(state_dict[name])]
    if wrong:
        raise PrefixInputError(f"{some_of(wrong)} of the state dict are no tensors of floating-point numbers.")
    return {own: state_dict[name].detach().to("cpu", torch.float32) for own, name in found.items()}


def _other_variant(names: set[str]) -> str | None:
    """Which form of the paper's code has these parameters, if it is none that can be read."""
    kinds = {name.split(".")[0] for name in names}
    if kinds & {"wte_enc", "control_trans_enc", "control_trans2"}:
        return (
            f"{some_of(sorted(kinds & {'wte_enc', 'control_trans_enc', 'control_trans2'}))} belong to a prefix for "
            "BART, whose decoder counted the positions of text from 0 there, as if there were no prefix. Here text "
            "starts at position p, so the same keys and values would mean something else"
        )
    if "wte2" in kinds:
        return "wte2 belongs to an infix, which is computed anew from each source text"
    if kinds == {"wte"}:
        return "it holds embeddings (PrefixEmbTuning), which go in at the bottom of the model and not in every layer"
    if names == {"control_trans"}:
        return None
    if "wte" not in kinds and all(map(_NETWORK.fullmatch, names)):
        return "control_trans without wte computes the prefix anew from each text or control code"
    linears = sorted(int(name.split(".")[1]) for name in names if re.fullmatch(r"control_trans\.\d+\.weight", name))
    parts = {f"control_trans.{index}.{kind}" for index in linears for kind in ("weight", "bias")}
    if names != {"wte.weight", *parts} or linears not in ([0, 2], [0, 2, 4]):
        return (
            f"wte with a network of two or three linear layers is known, and this is {', '.join(sorted(names))[:200]}"
        )
    return None


def _layout(geometry: Geometry) -> PeftLayout:
    """The order of the numbers, which is PEFT's, too.

    Raises:
        IncompatibleBaseError: The base is not built like GPT-2.
    """
    layers = geometry.sites.get(SITE, ())
    shapes = set(layers)
    first = next(iter(shapes), None)
    if set(geometry.sites) != {SITE} or len(shapes) != 1 or first is None or first.key_width != first.value_width:
        raise IncompatibleBaseError(
            "The paper's code has prefixes for GPT-2: a decoder alone, all of whose layers have the same heads. This "
            "base is built otherwise."
        )
    return PeftLayout(first.kv_heads, first.key_width, len(layers), 1, layers)


def _rows(own: PrefixTensors, layout: PeftLayout) -> torch.Tensor:
    """What the network gives, `(p, row)`."""
    rows = own["wte.weight"]
    for index in sorted(int(name.split(".")[1]) for name in own if name.endswith(".bias")):
        weight, bias = own[f"control_trans.{index}.weight"], own[f"control_trans.{index}.bias"]
        if rows.dim() != 2 or not rows.numel() or weight.shape != (len(bias), rows.shape[1]) or bias.dim() != 1:
            raise PrefixInputError(
                f"control_trans.{index} of the state dict has weights of shape {tuple(weight.shape)} and a bias of "
                f"shape {tuple(bias.shape)}, which do not fit what goes in, {tuple(rows.shape)}."
            )
        rows = torch.nn.functional.linear(torch.tanh(rows) if index else rows, weight, bias)
    if rows.shape[1] == own["wte.weight"].shape[1] != layout.row:
        raise PrefixInputError(
            "This state dict cannot be read: its network produces embeddings (PrefixEmbTuning), which go in at the "
            "bottom of the model and not in every layer."
        )
    if rows.shape[1] != layout.row:
        raise _does_not_fit(layout, f"{rows.shape[1]} numbers for each virtual token")
    return rows


def _prefix_itself(prefix: torch.Tensor, layout: PeftLayout) -> torch.Tensor:
    """The prefix `(p, row)` where there is no network: in a row, or as a cache of words `(2 layers, 1, H, p, D)`."""
    if prefix.dim() == 5:
        shape = (2 * layout.pairs, 1, layout.heads, prefix.shape[3], layout.width)
        if prefix.shape == shape and prefix.numel():
            return prefix[:, 0].permute(2, 0, 1, 3).flatten(1)
    elif prefix.dim() == 1 and prefix.numel() and prefix.numel() % layout.row == 0:
        return prefix.view(-1, layout.row)
    raise _does_not_fit(layout, f"a control_trans of shape {tuple(prefix.shape)}")


def _does_not_fit(layout: PeftLayout, found: str) -> IncompatibleBaseError:
    return IncompatibleBaseError(
        f"The state dict has {found}; the base has {layout.pairs} layers with {layout.heads} heads of width "
        f"{layout.width}, that is {layout.row} numbers for each virtual token. Load it onto the GPT-2 (small, medium, "
        "large) that it was trained on."
    )


def _is_number(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta

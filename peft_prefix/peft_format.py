"""Prefixes as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`, read and written without PEFT.

PEFT stores the keys and values themselves (`prompt_embeddings`), also where a network produced them
(`prefix_projection`); `peft_layout.py` says which number is which. A Cartridge is the same file with another name for
the method. Both files may come from a stranger: whatever is in them, the answer is a prefix or one of this library's
errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from .atomic import write_files
from .checkpoint import require_finite, stored
from .config import PrefixConfig
from .errors import IncompatibleBaseError, PrefixConfigError, PrefixFileError, name_of, some_of
from .geometry import Geometry
from .modules_to_save import MODULES
from .parameterization import PrefixTensors
from .peft_config import CONFIG_FILE, PEFT_TYPES, TENSOR_FILE, PeftConfig, read_config
from .peft_layout import SITE, PeftLayout, has_windows, layout_for, obstacle
from .peft_modules import BASE, EMBEDDINGS, TaskType, task_type, weights_for, weights_to_write
from .plain_file import folder_here
from .tensor_file import TensorFile, opened


def read_peft(
    config_file: Path, weights_file: Path, base: PreTrainedModel, geometry: Geometry
) -> tuple[PrefixConfig, PrefixTensors]:
    """A prefix-tuning or Cartridge adapter of PEFT as a prefix that gives the same logits.

    Everything is checked against the base before the numbers are read. `num_frozen_tokens` of a Cartridge is about
    training and is ignored: here all virtual tokens are trained or none. The files do not say what the prefix started
    from, so the configuration names PEFT's default: random numbers (`init_weights="zero"`: zeros).

    Args:
        config_file: `adapter_config.json`.
        weights_file: `adapter_model.safetensors`.
        base: The model that the adapter was trained on.
        geometry: Its geometry, at all sites.

    Returns:
        The configuration, with the site `decoder` alone, and the tensors of a prefix's file by name, in PEFT's dtype:
        keys and values `(H, p, D)`, and the weights of modules that were trained with them.

    Raises:
        PrefixFileError: A file is missing, damaged, a pickle, holds another method's adapter, NaN or infinity.
        IncompatibleBaseError: The base has other layers, heads, widths or modules, or PEFT computes something that a
            prefix of this library cannot.
    """
    config = read_config(config_file)
    _require_safetensors(weights_file)
    reason = _unreadable(config, base, geometry)
    if reason is not None:
        raise IncompatibleBaseError(f"{config_file} cannot be loaded onto {name_of(base)}: {reason}.")
    with opened(weights_file) as file:
        layout = _layout_of(file, config, base, geometry)
        weights = weights_for(file.path, file.shapes, config.modules_to_save, base)
        found = file.tensors()
    require_finite(found, f"{weights_file} was not loaded")
    tensors = layout.tensors(found[EMBEDDINGS])
    for place, kept in weights.places.items():
        if not torch.equal(found[BASE + place], found[BASE + kept]):
            raise IncompatibleBaseError(
                f"{weights_file} has different weights for {kept} and {place}, which are one in {name_of(base)}. Load "
                "the base with weights that are not tied (tie_word_embeddings=False)."
            )
    tensors |= {name: found[BASE + name.removeprefix(f"{MODULES}.")] for name in weights.saved()}
    prefix_config = PrefixConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        init="zeros" if config.starts_at_zero else "normal",
        init_std=1.0,
        sites=(SITE,),
        sliding_window="plain" if has_windows(base) else "pinned",
        modules_to_save=weights.module_names,
        base_model_name_or_path=config.base_model_name_or_path,
        base_model_revision=config.revision,
    )
    return prefix_config, tensors


def write_peft(
    directory: Path,
    config: PrefixConfig,
    tensors: Mapping[str, torch.Tensor],
    base: PreTrainedModel,
    geometry: Geometry,
    dtype: torch.dtype,
) -> None:
    """Save a prefix as PEFT would, so that `PeftModel.from_pretrained(base, directory)` gives the same logits.

    Both files are written, each as a whole, after everything has been checked.

    Args:
        directory: Folder for the two files; made if it is missing.
        config: Configuration of the prefix.
        tensors: What its file would contain (`prefix_state_dict`).
        base: Its base model.
        geometry: Geometry of the base, at all sites.
        dtype: Floating-point dtype of the file.

    Raises:
        PrefixConfigError: PEFT has no such prefix: another site than `decoder`, a sliding window that the prefix does
            not leave, or a base on which PEFT computes something else.
        PrefixInputError: `dtype` is none of float32, float16 and bfloat16.
        PrefixFileError: A number is not finite in this dtype, or the folder holds an adapter of another method.
    """
    task = _require_expressible(config, base, geometry)
    layout = layout_for(base, geometry)
    modules = weights_to_write(config.modules_to_save or (), tensors, base, task)
    rows = layout.rows(tensors, config.num_virtual_tokens)
    # Copies: one weight may stand in two places, which a file of tensors does not know.
    found = {name: tensor.clone() for name, tensor in {EMBEDDINGS: rows, **modules}.items()}
    content = stored(found, dtype)
    require_finite(content, f"Not saved to {directory}, which is left as it was")
    _require_own(directory)
    fields = {
        "peft_type": PEFT_TYPES[0],
        "task_type": task,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.base_model_revision,
        "inference_mode": True,
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_transformer_submodules": layout.submodules,
        "num_layers": layout.pairs,
        "num_attention_heads": layout.heads,
        "token_dim": layout.token_dim,
        "encoder_hidden_size": layout.token_dim,
        "prefix_projection": False,
        "modules_to_save": list(config.modules_to_save or ()) or None,
    }
    description = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    write_files(directory, {TENSOR_FILE: save(content, metadata={"format": "pt"}), CONFIG_FILE: description.encode()})


def _unreadable(config: PeftConfig, base: PreTrainedModel, geometry: Geometry) -> str | None:
    """Why the base cannot have this prefix, as far as the configuration tells."""
    reason = obstacle(base, geometry)
    if reason is not None:
        return reason
    is_pair = bool(base.config.is_encoder_decoder)
    submodules = config.num_transformer_submodules or (2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1)
    if submodules != (2 if is_pair else 1):
        kind = "an encoder-decoder language model" if is_pair else "a decoder alone"
        return (
            f"it is {kind}, and the adapter was made for something else (task_type {config.task_type}, "
            f"num_transformer_submodules {submodules}). Load the base with the class that it was trained with"
        )
    return None


def _layout_of(file: TensorFile, config: PeftConfig, base: PreTrainedModel, geometry: Geometry) -> PeftLayout:
    """The layout of a file's numbers, once its shape is known to be the base's."""
    shape = file.shapes.get(EMBEDDINGS)
    if shape is None:
        raise PrefixFileError(
            f"{file.path} has no {EMBEDDINGS}, where PEFT keeps keys and values, but "
            f"{some_of(name[:80] for name in sorted(file.shapes)) or 'nothing'}."
        )
    layout = layout_for(base, geometry)
    pairs = shape[-1] // (2 * layout.token_dim) if len(shape) == 2 else 0
    if pairs >= 1:
        layout = layout_for(base, geometry, pairs)
    found = {
        "shape": list(shape),
        "num_layers": config.num_layers or layout.pairs,
        "num_attention_heads": config.num_attention_heads or layout.heads,
        "token_dim": config.token_dim or layout.token_dim,
    }
    needed = {
        "shape": [config.num_virtual_tokens, layout.row],
        "num_layers": layout.pairs,
        "num_attention_heads": layout.heads,
        "token_dim": layout.token_dim,
    }
    depth = len(layout.layers)
    if found != needed or layout.pairs < depth or (layout.submodules == 1 and layout.pairs != depth):
        raise IncompatibleBaseError(
            f"{file.path} was trained on {config.base_model_name_or_path or 'an unnamed model'} and does not fit "
            f"{name_of(base)}, whose decoder has {depth} layers with {layout.heads} key/value heads of width "
            f"{layout.width}: the file has {found}. Load it onto the model that it was trained on."
        )
    return layout


def _require_expressible(config: PrefixConfig, base: PreTrainedModel, geometry: Geometry) -> str:
    """Check that PEFT can do what the prefix does, and tell PEFT's name for the base's task.

    Raises:
        PrefixConfigError: It cannot.
    """
    sites: tuple[str, ...] = config.sites or tuple(geometry.sites)
    reason = obstacle(base, geometry)
    if sites != (SITE,):
        others = some_of(repr(site) for site in sites if site != SITE)
        reason = f"it acts at {others}, and PEFT has prefixes in the decoder's self-attention alone"
        reason += f' (train one with PrefixConfig(sites=["{SITE}"]))'
    elif reason is None and config.sliding_window == "pinned" and has_windows(base):
        reason = (
            "it stays visible in sliding windows, and in PEFT virtual tokens leave them as real ones do (train one "
            'with PrefixConfig(sliding_window="plain"))'
        )
    task = task_type(base)
    if reason is None and task is None:
        reason = f"PEFT has no task for {type(base).__name__}"
    if reason is not None or task is None:
        raise PrefixConfigError(
            f"This prefix cannot be saved for PEFT: {reason}. save_pretrained saves it in this library's own format."
        )
    return task


def _require_own(directory: Path) -> None:
    """Check that saving here destroys no adapter of another method.

    Raises:
        PrefixFileError: It would.
    """
    folder = folder_here(directory)
    if folder is not None and (folder / CONFIG_FILE).exists():
        try:
            read_config(directory / CONFIG_FILE)
        except PrefixFileError as error:
            raise PrefixFileError(
                f"Not saved: {directory} holds another adapter ({error}), which saving here would destroy. Save to a "
                "folder of its own."
            ) from error


def _require_safetensors(file: Path) -> None:
    """Check that the weights are no pickle.

    Raises:
        PrefixFileError: They are, or there are none.
    """
    pickle = file if file.suffix in (".bin", ".pt", ".pth") else file.with_name("adapter_model.bin")
    if pickle == file or (not file.exists() and pickle.exists()):
        raise PrefixFileError(
            f"{pickle} is a pickle, which can run any code when it is opened; this library never opens one. If you "
            "trust its source, load it with PEFT and save it again: PeftModel.from_pretrained(base, folder)"
            ".save_pretrained(new_folder, safe_serialization=True)."
        )

"""The file format of a prefix: `prefix.safetensors`, with a readable copy of its metadata in `prefix_config.json`.

The tensor file is complete by itself and is what loading reads: plain keys and values, one tensor per site, layer and
role, the weights of modules that were trained with them, and the whole description in its metadata. It is written aside
and renamed, so a crash leaves the old file or the new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .atomic import write_files
from .description import DTYPES, FORMAT_VERSION, PrefixDescription
from .errors import IncompatibleBaseError, PrefixConfigError, PrefixFileError, PrefixInputError, plain, some_of
from .modules_to_save import MODULES
from .parameterization import PrefixTensors
from .tensor_file import TensorFile
from .version import __version__

TENSOR_FILE = "prefix.safetensors"
CONFIG_FILE = "prefix_config.json"
_METADATA_KEY = "peft_prefix"
_CHECKSUM_KEY = "peft_prefix_sha256"
"""Where the hash of the description is; that of the numbers is in the description."""
_TRAINING_STATE = "training state"
"""What a training state has there."""


def identity(tensors: PrefixTensors) -> str:
    """The sha256 over names, shapes, dtypes and numbers, independent of how the file is laid out."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_prefix(directory: Path, tensors: PrefixTensors, description: PrefixDescription) -> None:
    """Save a prefix, leaving what is there untouched unless everything succeeds.

    Args:
        directory: Folder for the files; made if it is missing.
        tensors: What `stored` gave.
        description: What is said of them.

    Raises:
        PrefixFileError: A number is not finite, or the folder cannot be written.
    """
    require_finite(tensors, f"Not saved to {directory}, which is left as it was")
    text = description.to_json()
    metadata = {"format": "pt", _METADATA_KEY: text, _CHECKSUM_KEY: _checksum(text)}
    write_files(
        directory,
        {
            TENSOR_FILE: save(tensors, metadata=metadata),
            CONFIG_FILE: (description.to_json(indent=2) + "\n").encode(),
        },
    )


def stored(tensors: PrefixTensors, dtype: torch.dtype) -> PrefixTensors:
    """The tensors as they are saved.

    Raises:
        PrefixInputError: `dtype` is none of float32, float16 and bfloat16.
    """
    if not isinstance(dtype, torch.dtype) or _dtype_name(dtype) not in DTYPES:
        raise PrefixInputError(
            f"A prefix is saved as torch.float32, torch.float16 or torch.bfloat16 (not strings), not as {dtype!r}."
        )
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


def write_training_state(file: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Save a training state, but never over the weights of another model.

    Raises:
        PrefixFileError: The file exists and holds something else.
    """
    if file.exists():
        try:
            with safe_open(file, framework="pt") as content:
                is_own = (content.metadata() or {}).get(_METADATA_KEY) == _TRAINING_STATE
                foreign = [name for name in content.keys() if not name.startswith("prefixes.")]  # noqa: SIM118
        except SafetensorError as error:
            raise PrefixFileError(
                f"{file} is there already and cannot be read ({error}), so it is not written over. Remove it, or save "
                "to another folder."
            ) from error
        if foreign and not is_own:
            raise PrefixFileError(
                f"{file} holds the weights of another model ({some_of(foreign)}), which saving here would destroy. "
                "Save the prefix to a folder of its own."
            )
    detached = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = save(detached, metadata={"format": "pt", _METADATA_KEY: _TRAINING_STATE})
    write_files(file.parent, {file.name: content})


def read_training_state(file: Path, names: Container[str]) -> dict[str, torch.Tensor]:
    """Some entries of a training state, by name, as far as they are there; none if the file is something else.

    Raises:
        PrefixFileError: The file cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as content:
            if (content.metadata() or {}).get(_METADATA_KEY) != _TRAINING_STATE:
                return {}
            return {name: content.get_tensor(name) for name in content.keys() if name in names}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PrefixFileError(f"{file} is damaged ({error}). Go back to an earlier checkpoint.") from error


def read_description(content: TensorFile) -> PrefixDescription:
    """The description inside a tensor file.

    Raises:
        PrefixFileError: The file is no prefix, or says of itself what cannot be.
    """
    if _METADATA_KEY not in content.metadata:
        raise PrefixFileError(f"{content.path} is a safetensors file but not a prefix that this library saved.")
    text = content.metadata[_METADATA_KEY]
    if content.metadata.get(_CHECKSUM_KEY) != _checksum(text):
        raise PrefixFileError(
            f"{content.path} is damaged: its description does not match its checksum. Save or download it again."
        )
    try:
        description = PrefixDescription.from_json(text)
    except PrefixConfigError as error:
        raise PrefixFileError(
            f"{content.path} describes itself in a way that version {__version__} does not understand "
            f"({plain(str(error), 500)}). Upgrade peft_prefix, or save the prefix again."
        ) from error
    if description.format_version != FORMAT_VERSION:
        raise PrefixFileError(
            f"{content.path} has format version {description.format_version}; this library reads {FORMAT_VERSION}. "
            "Upgrade peft_prefix."
        )
    return description


def read_tensors(
    content: TensorFile, description: PrefixDescription, expected: Mapping[str, tuple[int, ...]], base_name: str
) -> PrefixTensors:
    """The tensors of a file, checked against the base before and against their hash after reading.

    Args:
        content: The tensor file.
        description: What it says about itself.
        expected: Shapes by name of what the base model needs: keys, values and the weights of modules.
        base_name: What to call the base model in errors.

    Raises:
        IncompatibleBaseError: The base model has other layers, heads or widths, or a head of another shape.
        PrefixFileError: The file is damaged, its content does not match its hash, or a number is not finite.
    """
    file = content.path
    if content.shapes != expected:
        raise IncompatibleBaseError(_mismatch(file, description, base_name, content.shapes, expected))
    others = [name for name, dtype in content.dtypes.items() if _dtype_name(dtype) != description.dtype]
    if others:
        raise PrefixFileError(
            f"{file} is damaged: {some_of(others)} are not {description.dtype}, as it says. Save or download it again."
        )
    tensors = content.tensors()
    if identity(tensors) != description.sha256:
        raise PrefixFileError(f"{file} is damaged: its content does not match its sha256. Save or download it again.")
    require_finite(tensors, f"{file} was not loaded")
    return tensors


def require_finite(tensors: PrefixTensors, consequence: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        PrefixFileError: Names the tensors and what did not happen.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise PrefixFileError(
            f"{consequence}: {some_of(broken)} contain NaN or infinity. Training diverged (lower the learning rate "
            "and go back to an earlier checkpoint), or the numbers do not fit the file's dtype (use float32)."
        )


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mismatch(
    file: Path,
    description: PrefixDescription,
    base_name: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
) -> str:
    trained_on = description.config.base_model_name_or_path or "an unnamed model"
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            difference = f"{plain(name)} has shape {found.get(name)} in the file, {expected.get(name)} is needed"
            if name not in expected:
                difference = f"the file has {plain(name)}, for which the model has no place"
            elif name not in found:
                difference = f"the model needs {name}, which the file does not have"
            break
    if name.startswith(MODULES):
        return (
            f"{file} was trained on {trained_on} with another head than {base_name} has: {difference}. Load the base "
            "as it was loaded for training: with the same class and, for a classifier, the same num_labels=..."
        )
    return (
        f"{file} was trained on {trained_on} and does not fit {base_name}: {difference}. Load it onto the model that "
        "it was trained on."
    )

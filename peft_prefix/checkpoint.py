"""The file format of a prefix: `prefix.safetensors`, with a readable copy of its metadata in `prefix_config.json`.

The tensor file is complete by itself and is what loading reads: plain keys and values, one tensor per site, layer and
role, the weights of modules that were trained with them, and the whole description in its metadata. It is written aside
and renamed, so a crash leaves the old file or the new one.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from .config import PrefixConfig
from .errors import IncompatibleBaseError, PrefixConfigError, PrefixFileError, PrefixInputError, some_of
from .geometry import Geometry
from .modules_to_save import MODULES
from .parameterization import PrefixTensors
from .placement import repeated_names, weight_of
from .processes import is_sharded
from .version import __version__

TENSOR_FILE = "prefix.safetensors"
CONFIG_FILE = "prefix_config.json"
FORMAT_VERSION = 1
_METADATA_KEY = "peft_prefix"


@dataclass(frozen=True)
class PrefixDescription:
    """What a saved prefix says about itself, beside its tensors.

    Args:
        config: The configuration that it was made with.
        geometry_fingerprint: `Geometry.fingerprint` of its base model.
        weights_fingerprint: `weights_fingerprint` of its base model, `None` if it could not be taken.
        dtype: Name of the tensors' dtype, e.g. `float32`.
        sha256: Hash over the tensors; the identity of this prefix.
        format_version: Version of this format.
        library_version: Version of the library that wrote the file.
    """

    config: PrefixConfig
    geometry_fingerprint: str
    weights_fingerprint: str | None
    dtype: str
    sha256: str
    format_version: int = FORMAT_VERSION
    library_version: str = __version__

    def to_json(self, indent: int | None = None) -> str:
        """All fields in one flat JSON object."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "config"}
        return json.dumps({**self.config.to_dict(), **fields}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> PrefixDescription:
        """The inverse of `to_json`.

        Raises:
            PrefixConfigError: A field is unknown, missing or its value cannot be.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise PrefixConfigError("The description of a prefix must be a JSON object.")
        if "num_virtual_tokens" not in fields:
            raise PrefixConfigError("The description of a prefix is incomplete: num_virtual_tokens is missing.")
        own = {field.name for field in dataclasses.fields(cls) if field.name != "config"}
        config = PrefixConfig.from_dict({name: value for name, value in fields.items() if name not in own})
        try:
            return cls(config=config, **{name: value for name, value in fields.items() if name in own})
        except TypeError as error:
            raise PrefixConfigError(f"The description of a prefix is incomplete: {error}.") from error


def identity(tensors: PrefixTensors) -> str:
    """The sha256 over names, shapes, dtypes and numbers, independent of how the file is laid out."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_prefix(
    directory: Path,
    tensors: PrefixTensors,
    config: PrefixConfig,
    geometry: Geometry,
    weights_fingerprint: str | None,
    dtype: torch.dtype,
) -> None:
    """Save a prefix, leaving what is there untouched unless everything succeeds.

    Args:
        directory: Folder for the two files; made if it is missing.
        tensors: Plain keys and values by name, and the weights of the modules that are saved with them.
        config: Configuration of the prefix.
        geometry: Geometry of its base model.
        weights_fingerprint: Fingerprint of its base model's weights, if there is one.
        dtype: Floating-point dtype of the file.

    Raises:
        PrefixInputError: `dtype` is none of float32, float16 and bfloat16.
        PrefixFileError: A number is not finite (also after conversion to `dtype`), or `directory` is a file.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise PrefixInputError(
            f"A prefix is saved as torch.float32, torch.float16 or torch.bfloat16 (not strings), not as {dtype!r}."
        )
    stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    require_finite(stored, f"Not saved to {directory}, which is left as it was")
    description = PrefixDescription(
        config=config,
        geometry_fingerprint=geometry.fingerprint,
        weights_fingerprint=weights_fingerprint,
        dtype=str(dtype).removeprefix("torch."),
        sha256=identity(stored),
    )
    if directory.is_file():
        raise PrefixFileError(f"{directory} is a file; give the folder in which the prefix is to be saved.")
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", _METADATA_KEY: description.to_json()}
    write_atomically(directory / TENSOR_FILE, save(stored, metadata=metadata))
    write_atomically(directory / CONFIG_FILE, (description.to_json(indent=2) + "\n").encode())


def write_training_state(file: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Save a training state, but never over the weights of another model.

    Raises:
        PrefixFileError: The file exists and holds something else.
    """
    if file.exists():
        with safe_open(file, framework="pt") as content:
            foreign = [name for name in content.keys() if not name.startswith("prefixes.")]  # noqa: SIM118
        if foreign:
            raise PrefixFileError(
                f"{file} holds the weights of another model ({some_of(foreign)}), which saving here would destroy. "
                "Save the prefix to a folder of its own."
            )
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(file, save(plain, metadata={"format": "pt"}))


def read_description(file: Path) -> PrefixDescription:
    """The description inside a tensor file.

    Raises:
        PrefixFileError: The file is missing, truncated, not safetensors or not a prefix.
    """
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
    except OSError as error:
        raise PrefixFileError(
            f"There is no prefix at {file} ({error}). Give a folder that save_pretrained wrote, or a repository id on "
            "the Hub."
        ) from error
    except SafetensorError as error:
        raise PrefixFileError(
            f"{file} is damaged or no safetensors file ({error}). Save or download it again."
        ) from error
    if _METADATA_KEY not in metadata:
        raise PrefixFileError(f"{file} is a safetensors file but not a prefix that this library saved.")
    try:
        description = PrefixDescription.from_json(metadata[_METADATA_KEY])
    except (ValueError, TypeError) as error:
        raise PrefixFileError(
            f"{file} describes itself in a way that version {__version__} does not understand ({error}). Upgrade "
            "peft_prefix, or save the prefix again."
        ) from error
    if description.format_version != FORMAT_VERSION:
        raise PrefixFileError(
            f"{file} has format version {description.format_version}; this library reads {FORMAT_VERSION}. Upgrade "
            "peft_prefix."
        )
    return description


def read_tensors(
    file: Path,
    description: PrefixDescription,
    geometry: Geometry,
    base_name: str,
    modules: Mapping[str, torch.Tensor] | None = None,
) -> PrefixTensors:
    """The tensors of a file, checked against the base before and against their hash after reading.

    Args:
        file: The tensor file.
        description: What it says about itself.
        geometry: Geometry of the base model.
        base_name: What to call the base model in errors.
        modules: Tensors with the names and shapes of the weights that belong to modules of the base.

    Raises:
        IncompatibleBaseError: The base model has other layers, heads or widths, or a head of another shape.
        PrefixFileError: The file is damaged, its content does not match its hash, or a number is not finite.
    """
    expected: dict[str, tuple[int, ...]] = {**geometry.tensor_shapes(description.config.num_virtual_tokens)}
    expected |= {name: tuple(tensor.shape) for name, tensor in (modules or {}).items()}
    try:
        with safe_open(file, framework="pt") as content:
            found = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
            if found != expected:
                raise IncompatibleBaseError(_mismatch(file, description, base_name, found, expected))
            tensors = {name: content.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise PrefixFileError(f"{file} is damaged ({error}). Save or download it again.") from error
    if identity(tensors) != description.sha256:
        raise PrefixFileError(f"{file} is damaged: its content does not match its sha256. Save or download it again.")
    require_finite(tensors, f"{file} was not loaded")
    return tensors


def weights_fingerprint(base: PreTrainedModel, without: Iterable[str] = ()) -> str | None:
    """A short sample of the base's weights, enough to tell two models of the same shape apart.

    Four numbers of each of up to 64 weight matrices, spread over the model, with their dtype and a hash of the
    matrices' names. `None` where weights cannot be read: not materialized, sharded over processes, or quantized.

    Args:
        base: The base model.
        without: Names of modules to leave out: a prefix brings its own weights for them, and a fresh head is another
            one each time.
    """
    left_out = tuple(f"{name}." for name in without)
    weights = list(base.named_parameters())
    # Only what is put aside has hidden that it is another one; a bank asks for the fingerprint with each prefix.
    repeated = repeated_names(base) if any(weight.is_meta for _, weight in weights) else ()
    matrices = sorted(
        (name, weight)
        for name, weight in weights
        if weight.dim() >= 2 and weight.is_floating_point() and not name.startswith(left_out) and name not in repeated
    )
    quantized = getattr(base, "hf_quantizer", None) is not None
    if quantized or not matrices:
        return None
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


def same_weights(one: str | None, other: str | None) -> bool:
    """Whether two fingerprints may come from the same weights, loaded in the same precision or in different ones.

    A missing fingerprint may come from any weights.
    """
    if one is None or other is None:
        return True
    (dtype, names, sample), (other_dtype, other_names, other_sample) = one.split(":"), other.split(":")
    if names != other_names:
        return False
    left, right = (
        torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32) for text in (sample, other_sample)
    )
    if dtype == other_dtype:
        return torch.equal(left, right)
    # Two roundings of the same number differ by one step of the coarser precision at most.
    return left.shape == right.shape and torch.allclose(left, right, rtol=2**-7, atol=2**-24)


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


def write_atomically(file: Path, content: bytes) -> None:
    """Write aside, flush to disk, then rename over the target."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    aside = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)  # a temporary file is private; the result is as readable as any other
        aside.replace(file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _mismatch(
    file: Path, description: PrefixDescription, base_name: str, found: dict[str, Any], expected: dict[str, Any]
) -> str:
    trained_on = description.config.base_model_name_or_path or "an unnamed model"
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            difference = f"{name} has shape {found.get(name)} in the file, {expected.get(name)} is needed"
            if name not in expected:
                difference = f"the file has {name}, for which the model has no place"
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

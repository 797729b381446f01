from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from helpers import prefix_metadata, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_prefix import (
    IncompatibleBaseError,
    PrefixConfig,
    PrefixFileError,
    PrefixInputError,
    PrefixModel,
    PrefixWarning,
    __version__,
    get_prefix_model,
)
from peft_prefix.fingerprint import same_weights, weights_fingerprint


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a saved prefix of a tiny llama."""
    random_model(FAMILIES["llama"].build()).save_pretrained(tmp_path / "prefix")
    return tmp_path / "prefix"


def load(folder: Path, family: str = "llama", **options: object) -> PrefixModel:
    return PrefixModel.from_pretrained(FAMILIES[family].build(), folder, **options)  # type: ignore[arg-type]


def test_the_files_are_what_the_format_says(saved: Path) -> None:
    assert {file.name for file in saved.iterdir()} == {"prefix.safetensors", "prefix_config.json", "README.md"}
    tensors = load_file(saved / "prefix.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"decoder.layers.{layer}.{role}": (2, 4, 16) for layer in range(3) for role in ("key", "value")
    }
    description = json.loads((saved / "prefix_config.json").read_text())
    with safe_open(saved / "prefix.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["peft_prefix"]) == description
    assert description["format_version"] == 1
    assert description["library_version"] == __version__
    assert description["num_virtual_tokens"] == 4
    assert description["sites"] == ["decoder"]
    assert description["dtype"] == "float32"
    assert len(description["sha256"]) == len(description["geometry_fingerprint"]) == 64


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_file_is_hardly_larger_than_its_numbers(family: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES[family].build(), p=20)
    model.save_pretrained(tmp_path)
    tensors = model.prefix_state_dict()
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert (tmp_path / "prefix.safetensors").stat().st_size <= 4 * numbers + 4096 + 120 * len(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_file_can_be_chosen(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"].build())
    model.save_pretrained(tmp_path, dtype=dtype)
    for name, tensor in load(tmp_path).prefix_state_dict().items():
        assert torch.equal(tensor, model.prefix_state_dict()[name].to(dtype).float())


def test_the_mlp_is_folded_away(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"].build(), reparameterization="mlp")
    torch.nn.init.normal_(model.prefixes["default"].decoder.output.weight, std=0.01)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "prefix.safetensors")) == set(model.prefix_state_dict())
    trained_further = load(tmp_path, is_trainable=True)
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(trained_further.prefix_state_dict()[name], tensor)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_prefix_is_frozen_unless_it_is_to_be_trained(saved: Path, is_trainable: bool) -> None:
    model = load(saved, is_trainable=is_trainable)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == (6 if is_trainable else 0)
    assert not model.training


def test_saving_overwrites_and_a_subfolder_can_be_read(saved: Path) -> None:
    other = get_prefix_model(FAMILIES["llama"].build(), PrefixConfig(num_virtual_tokens=2))
    other.save_pretrained(saved)
    loaded = PrefixModel.from_pretrained(FAMILIES["llama"].build(), saved.parent, subfolder="prefix")
    assert loaded.prefixes.entry("default").config.num_virtual_tokens == 2


def test_another_geometry_is_refused(saved: Path) -> None:
    message = (
        r"was trained on .* does not fit .*: decoder.layers.0.key has shape \(2, 4, 16\) .* \(4, 4, 16\) is needed"
    )
    with pytest.raises(IncompatibleBaseError, match=message):
        load(saved, "gpt2")
    with pytest.raises(IncompatibleBaseError, match=r"the file has decoder\.layers\.2\.key, for which"):
        load(saved, "qwen3")


def test_other_weights_draw_a_warning_that_names_both(tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.config.name_or_path = "someone/first"
    random_model(base).save_pretrained(tmp_path)
    other = FAMILIES["llama"].build(seed=1)
    other.config.name_or_path = "someone/second"
    with pytest.warns(PrefixWarning, match="trained on someone/first, but someone/second has the same shape"):
        PrefixModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_precision_are_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    random_model(FAMILIES["llama"].build(dtype=dtype)).save_pretrained(tmp_path)
    for precision in (torch.float32, torch.bfloat16, torch.float16):
        PrefixModel.from_pretrained(FAMILIES["llama"].build(dtype=precision), tmp_path)


@pytest.mark.parametrize("family", ["gptj", "codegen", "opt", "mpt"])
def test_another_architecture_of_the_same_shape_draws_a_warning(family: str, tmp_path: Path) -> None:
    random_model(FAMILIES["gpt2"].build()).save_pretrained(tmp_path)
    with pytest.warns(PrefixWarning, match="has the same shape with other weights"):
        load(tmp_path, family)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype, saved: Path) -> None:
    before = (saved / "prefix.safetensors").read_bytes()
    with pytest.raises(PrefixInputError, match=r"torch\.float16 or torch\.bfloat16 \(not strings\), not as"):
        random_model(FAMILIES["llama"].build()).save_pretrained(saved, dtype=dtype)
    assert (saved / "prefix.safetensors").read_bytes() == before


def test_a_training_checkpoint_is_never_written_over_a_models_weights(tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path / "checkpoint-100")
    before = (tmp_path / "checkpoint-100" / "model.safetensors").read_bytes()
    with pytest.raises(PrefixFileError, match="holds the weights of another model"):
        random_model(base).save_pretrained(tmp_path / "checkpoint-100")
    assert (tmp_path / "checkpoint-100" / "model.safetensors").read_bytes() == before
    for _ in range(2):
        random_model(base).save_pretrained(tmp_path / "checkpoint-5")


def test_a_frozen_prefix_needs_no_network(tmp_path: Path) -> None:
    random_model(FAMILIES["llama"].build(), reparameterization="mlp").save_pretrained(tmp_path)
    frozen, trained = (load(tmp_path, is_trainable=trainable) for trainable in (False, True))
    assert not list(frozen.prefixes.parameters())
    assert sum(rows.numel() for rows in frozen.prefixes.entry().module.stored.values()) == 768
    assert sum(parameter.numel() for parameter in trained.prefixes.parameters()) > 100_000


def test_fingerprints_see_a_slight_fine_tuning() -> None:
    base = FAMILIES["llama"].build()
    before = weights_fingerprint(base)
    assert same_weights(before, weights_fingerprint(base))
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.mul_(1.0001)
    assert not same_weights(before, weights_fingerprint(base))
    assert same_weights(before, None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrefixFileError, match=r"There is no prefix at .*prefix.safetensors. Give a folder"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved: Path, keep: float) -> None:
    file = saved / "prefix.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(PrefixFileError, match="damaged"):
        load(saved)


def test_a_flipped_bit_is_noticed(saved: Path) -> None:
    file = saved / "prefix.safetensors"
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)
    with pytest.raises(PrefixFileError, match="does not match its sha256"):
        load(saved)


def test_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    file = saved / "prefix.safetensors"
    save_file(load_file(file), file)
    with pytest.raises(PrefixFileError, match="not a prefix that this library saved"):
        load(saved)
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(PrefixFileError, match="damaged"):
        load(saved)
    file.unlink()
    file.mkdir()
    with pytest.raises(PrefixFileError):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format_version=2), "format version 2.*Upgrade"),
        (dict(surprise=1), "no field 'surprise'"),
        (dict(num_virtual_tokens=-1), "num_virtual_tokens must be"),
        (dict(sha256=None), "impossible sha256"),
        (dict(num_virtual_tokens=...), "num_virtual_tokens is missing"),
    ],
)
def test_descriptions_that_are_not_understood_are_refused(saved: Path, change: dict[str, object], message: str) -> None:
    file = saved / "prefix.safetensors"
    with safe_open(file, framework="pt") as content:
        metadata = json.loads(content.metadata()["peft_prefix"])
    changed = {name: value for name, value in {**metadata, **change}.items() if value is not ...}
    save_file(load_file(file), file, metadata=prefix_metadata(json.dumps(changed)))
    with pytest.raises(PrefixFileError, match=message):
        load(saved)
    save_file(load_file(file), file, metadata=prefix_metadata("no json"))
    with pytest.raises(PrefixFileError, match="describes itself"):
        load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_neither_saved_nor_loaded(saved: Path, value: float) -> None:
    model = random_model(FAMILIES["llama"].build())
    before = (saved / "prefix.safetensors").read_bytes()
    with torch.no_grad():
        model.prefixes["default"].decoder["layers"]["1"].key[0, 0, 0] = value
    with pytest.raises(PrefixFileError, match=r"left as it was: decoder\.layers\.1\.key contain NaN or infinity"):
        model.save_pretrained(saved)
    assert (saved / "prefix.safetensors").read_bytes() == before
    with torch.no_grad():
        model.prefixes["default"].decoder["layers"]["1"].key[0, 0, 0] = 1e6
    with pytest.raises(PrefixFileError, match="do not fit the file's dtype"):
        model.save_pretrained(saved, dtype=torch.float16)


def test_a_file_with_nan_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_prefix import checkpoint

    model = random_model(FAMILIES["llama"].build())
    with torch.no_grad():
        model.prefixes["default"].decoder["layers"]["1"].key[0, 0, 0] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "require_finite", lambda *_: None)
        model.save_pretrained(saved)
    with pytest.raises(PrefixFileError, match=r"was not loaded: decoder\.layers\.1\.key contain NaN"):
        load(saved)


def test_a_failing_write_leaves_the_old_prefix(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    expected = load(saved).prefix_state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            get_prefix_model(FAMILIES["llama"].build()).save_pretrained(saved)
    assert {file.name for file in saved.iterdir()} == {"prefix.safetensors", "prefix_config.json", "README.md"}
    for name, tensor in load(saved).prefix_state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_saving_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(PrefixFileError, match="is a file; give the folder"):
        random_model(FAMILIES["llama"].build()).save_pretrained(tmp_path / "taken")


def test_other_processes_do_not_write(tmp_path: Path) -> None:
    random_model(FAMILIES["llama"].build()).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["モデル\u3000集", "my\u00a0models", "a\tb", "x" * 5000, "\ud800"])
def test_whatever_the_base_is_called_a_prefix_can_be_saved(name: str, tmp_path: Path) -> None:
    base = FAMILIES["llama"].build()
    base.config.name_or_path = name
    model = random_model(base)
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "prefix_config.json").read_text())
    assert description["base_model_name_or_path"] in (name, None)
    PrefixModel.from_pretrained(base, tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything can be written here")
def test_a_folder_that_cannot_be_written_to_is_named(saved: Path) -> None:
    saved.chmod(0o500)
    with pytest.raises(PrefixFileError, match="cannot be written to"):
        random_model(FAMILIES["llama"].build()).save_pretrained(saved)
    saved.chmod(0o700)


def test_places_that_cannot_be_written_to_are_named(saved: Path) -> None:
    model = random_model(FAMILIES["llama"].build())
    before = load(saved).prefix_state_dict()
    for folder in (saved / "prefix.safetensors" / "inside", saved / ("x" * 300), saved / "a\0b"):
        with pytest.raises(PrefixFileError, match=r"cannot be written to|is a file"):
            model.save_pretrained(folder)
        with pytest.raises(PrefixFileError, match=r"cannot be written to|is a file"):
            model.save_as_peft(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in load(saved).prefix_state_dict().items())
    (saved / "taken").mkdir()
    (saved / "taken" / "prefix.safetensors").mkdir()
    with pytest.raises(PrefixFileError, match="cannot be written to"):
        model.save_pretrained(saved / "taken")


def test_a_card_that_cannot_be_read_is_no_reason_not_to_save(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"].build())
    (tmp_path / "README.md").mkdir()
    with pytest.warns(PrefixWarning, match="is saved in .* but not its card"):
        model.save_pretrained(tmp_path)
    load(tmp_path)


def test_saves_at_the_same_time_lose_no_section_of_the_card(tmp_path: Path) -> None:
    models = [random_model(FAMILIES["llama"].build()) for _ in range(3)]
    for number, model in enumerate(models):
        model.add_prefix(f"task{number}", model.prefixes.entry().config)
        model.prefixes["default"].requires_grad_(False)
        model.set_prefix(None)
    for _ in range(5):
        threads = [threading.Thread(target=model.save_pretrained, args=(tmp_path,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        card = (tmp_path / "README.md").read_text()
        assert all(f"<!-- peft_prefix: task{number} -->" in card for number in range(3))
        (tmp_path / "README.md").unlink()

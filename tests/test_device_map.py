"""A base that is spread over devices or kept aside in memory or on disk behaves as one that is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from families import FAMILIES, KINDS
from helpers import tokens
from test_trainer import Rows
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from peft_prefix import PrefixConfig, PrefixModel, get_prefix_model
from peft_prefix.placement import home, layer_devices

CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules"),
    # What generate of older versions says of any base whose first weights are on no device.
    pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device type"),
]


def device_map(base: PreTrainedModel) -> dict[str, str]:
    """Every second layer on disk, all else in memory."""
    kinds = base._no_split_modules or ()
    layers = [name for name, module in base.named_modules() if type(module).__name__ in kinds]
    places: dict[str, str] = {}

    def place(name: str, module: nn.Module) -> None:
        if name in layers:
            places[name] = "disk" if layers.index(name) % 2 else "cpu"
        elif not any(layer.startswith(f"{name}.") for layer in layers):
            places[name] = "cpu"
        else:
            inside(name, module)

    def inside(name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        for own, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            places[prefix + own] = "cpu"
        for own, part in module.named_children():
            place(prefix + own, part)

    inside("", base)
    assert {"cpu", "disk"} == set(places.values())
    return places


def half_on_disk(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return dispatch_model(
        base, device_map(base), main_device="cpu", offload_dir=folder, force_hooks=True, skip_keys="past_key_values"
    )


WAYS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "cpu": lambda base, folder: cpu_offload(base, CPU),
    "disk": lambda base, folder: disk_offload(base, str(folder), CPU) or base,
    "map": half_on_disk,
}
"""How a base is put aside; the CPU stands for the device that would run it."""


def inputs_for(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Padded texts."""
    ids, mask = tokens(2, 9), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    if not base.config.is_encoder_decoder:
        return dict(input_ids=ids, attention_mask=mask, labels=ids)
    return dict(input_ids=ids, attention_mask=mask.flip(1), labels=tokens(2, 5, 2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", KINDS)
@pytest.mark.ways("device map")
def test_a_base_that_is_put_aside_gives_the_same(family: str, way: str, tmp_path: Path) -> None:
    config = PrefixConfig(num_virtual_tokens=4)
    plain = get_prefix_model(FAMILIES[family].build(), config)
    base = WAYS[way](FAMILIES[family].build(), tmp_path / "weights")
    assert any(parameter.is_meta for parameter in base.parameters())
    model = get_prefix_model(base, config)
    assert model.device == CPU
    assert {parameter.device for parameter in model.prefixes.parameters()} == {CPU}
    for name, tensor in plain.prefix_state_dict().items():
        assert torch.equal(model.prefix_state_dict()[name], tensor), name

    inputs = inputs_for(base)
    expected, actual = plain(**inputs), model(**inputs)
    assert torch.equal(actual.logits, expected.logits)
    expected.loss.backward()
    actual.loss.backward()
    for (name, one), other in zip(plain.prefixes.named_parameters(), model.prefixes.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(other.grad, one.grad), name
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    generated = [one.generate(**asked, max_new_tokens=5, do_sample=False) for one in (plain, model)]
    assert torch.equal(*generated)
    assert model.accepts_loss_kwargs == plain.accepts_loss_kwargs

    model.save_pretrained(tmp_path / "aside")
    plain.save_pretrained(tmp_path / "plain")
    written = [(tmp_path / one / "prefix_config.json").read_text() for one in ("aside", "plain")]
    assert written[0] == written[1]  # the fingerprints, too
    for one in (base, FAMILIES[family].build()):
        loaded = PrefixModel.from_pretrained(one, tmp_path / "aside")
        assert torch.equal(loaded(**inputs).logits, expected.logits)
    with pytest.warns(UserWarning, match="same shape with other weights"):
        PrefixModel.from_pretrained(WAYS[way](FAMILIES[family].build(seed=1), tmp_path / "others"), tmp_path / "aside")


def test_the_trainer_trains_a_base_that_was_loaded_with_a_device_map(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "base")

    def train(**loading: Any) -> PrefixModel:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **loading)
        model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4, reparameterization="mlp"))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True
        )
        Trainer(model=model, args=arguments, train_dataset=Rows(8, 1)).train()
        return model

    plain = train()
    places = device_map(FAMILIES["llama"].build())
    model = train(device_map=places, offload_folder=str(tmp_path / "weights"))
    assert any(parameter.is_meta for parameter in model.base.parameters())
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    for name, tensor in plain.prefix_state_dict().items():
        assert torch.equal(model.prefix_state_dict()[name], tensor), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart", "longt5_local"])
def test_every_layer_has_its_prefix_on_its_own_device(family: str) -> None:
    """Several devices as their hooks name them, since this test has one; what is moved goes to "meta"."""
    model = get_prefix_model(FAMILIES[family].build(), PrefixConfig(num_virtual_tokens=3))
    structure = model._injection.structure
    places = layer_devices(model.base, structure)
    assert set(places.values()) == {CPU}
    for site, sizes in model.geometry.sites.items():
        assert {index for index, shape in enumerate(sizes) if shape is not None} == {
            index for owner, index in places if owner == site
        }

    layers = [one.module for one in structure.self_attention]
    for number, module in enumerate(layers):
        module._hf_hook = AlignDevicesHook(execution_device=f"cuda:{number}")
    places = layer_devices(model.base, structure)
    for number, attention in enumerate(structure.self_attention):
        assert places["decoder", attention.index] == torch.device(f"cuda:{number}")
    assert {device for (site, _), device in places.items() if site != "decoder"} <= {CPU}

    module = model.prefixes.entry().module
    module.spread({("decoder", 1): torch.device("meta")})
    moved = {name for name, parameter in module.named_parameters() if parameter.is_meta}
    assert moved == {"decoder.layers.1.key", "decoder.layers.1.value"}


def test_a_base_without_weights_is_at_home_nowhere() -> None:
    with torch.device("meta"):
        base = FAMILIES["llama"].build()
    assert home(base).type == "meta"

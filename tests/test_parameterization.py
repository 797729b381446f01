from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens

from peft_prefix import Geometry, LayerGeometry, PrefixConfig
from peft_prefix.parameterization import DirectPrefix, MLPPrefix, build_parameterization

UNEVEN = Geometry({"decoder": (LayerGeometry(2, 3, 4), LayerGeometry(1, 5, 2))})


def random_tensors(p: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in UNEVEN.tensor_shapes(p).items()}


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_both_forms_start_exactly_where_they_are_told(reparameterization: str) -> None:
    form = build_parameterization(UNEVEN, PrefixConfig(num_virtual_tokens=6, reparameterization=reparameterization))
    tensors = random_tensors(6)
    form.start_from(tensors)
    assert set(form()) == set(tensors)
    for name, tensor in form().items():
        assert torch.equal(tensor, tensors[name]), name


def test_parameters_of_the_direct_form_carry_the_names_of_the_file() -> None:
    form = build_parameterization(UNEVEN, PrefixConfig(num_virtual_tokens=6))
    assert isinstance(form, DirectPrefix)
    assert {name: tuple(p.shape) for name, p in form.named_parameters()} == {
        "decoder.layers.0.key": (2, 6, 3),
        "decoder.layers.0.value": (2, 6, 4),
        "decoder.layers.1.key": (1, 6, 5),
        "decoder.layers.1.value": (1, 6, 2),
    }


def test_the_network_is_the_papers() -> None:
    """Embedding, hidden layer, tanh, output; its width is the config's, whatever the model's size."""
    form = build_parameterization(UNEVEN, PrefixConfig(num_virtual_tokens=6, reparameterization="mlp"))
    assert isinstance(form, MLPPrefix)
    numbers = UNEVEN.numbers_per_token
    network = form.decoder
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == {
        "embedding": (6, 512),
        "hidden.weight": (512, 512),
        "hidden.bias": (512,),
        "output.weight": (numbers, 512),
        "output.bias": (numbers,),
    }
    tensors = random_tensors(6)
    form.start_from(tensors)
    torch.nn.init.normal_(network.output.weight)
    rows = network.output(torch.tanh(network.hidden(network.embedding)))
    assert rows.shape == (6, numbers)
    # the first layer's keys are the first 2 heads x 3 numbers of each virtual token's row
    expected = tensors["decoder.layers.0.key"] + rows[:, :6].reshape(6, 2, 3).transpose(0, 1)
    torch.testing.assert_close(form()["decoder.layers.0.key"], expected)
    last = tensors["decoder.layers.1.value"] + rows[:, -2:].reshape(6, 1, 2).transpose(0, 1)
    torch.testing.assert_close(form()["decoder.layers.1.value"], last)


def test_the_network_runs_once_for_the_whole_batch() -> None:
    model = random_model(FAMILIES["llama"].build(), reparameterization="mlp", mlp_hidden_size=8)
    calls: list[tuple[int, ...]] = []
    model.prefixes["default"].decoder.hidden.register_forward_hook(lambda *hook: calls.append(tuple(hook[2].shape)))
    model(input_ids=tokens(5, 4))
    assert calls == [(4, 8)]


def test_the_networks_weights_depend_on_the_seed_of_the_config_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        config = PrefixConfig(num_virtual_tokens=2, reparameterization="mlp", init_seed=seed)
        form = build_parameterization(UNEVEN, config)
        assert isinstance(form, MLPPrefix)
        return form.decoder.hidden.weight

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_each_site_has_its_own_network() -> None:
    layers = (LayerGeometry(2, 3, 4), None, LayerGeometry(1, 5, 2))
    geometry = Geometry({"encoder": layers, "cross": layers[2:]})
    form = build_parameterization(geometry, PrefixConfig(num_virtual_tokens=6, reparameterization="mlp"))
    assert {name for name, _ in form.named_children()} == {"encoder", "cross"}
    assert not torch.equal(form.encoder.embedding, form.cross.embedding)
    assert set(form()) == set(geometry.tensor_shapes(6))
    assert "encoder.layers.1.key" not in form()
    assert form.encoder().shape == (6, 2 * (3 + 4) + 5 + 2)
    assert torch.equal(form.encoder(), form.rows("encoder"))


def test_both_forms_learn_the_same_keys_and_values_only() -> None:
    for reparameterization in ("none", "mlp"):
        model = random_model(FAMILIES["qwen3"].build(), reparameterization=reparameterization, mlp_hidden_size=8)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert all(name.startswith("prefixes.default.") for name in trained)
        model.train()(input_ids=tokens(2, 6), labels=tokens(2, 6)).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)

"""What several processes would do wrong is refused in one already; the rest is in `test_distributed.py`."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_prefix import PrefixInputError
from peft_prefix.processes import is_sharded, whole


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_layers_that_are_wrapped_in_checkpoints_are_refused_in_training(family: str) -> None:
    model = random_model(FAMILIES[family].build())
    layers = model.base.encoder.block if family == "t5" else model.base.model.layers
    ids = tokens(1, 5)
    expected = model(input_ids=ids, labels=ids).loss
    layers[0] = checkpoint_wrapper(layers[0])
    with pytest.raises(PrefixInputError, match="gradient_checkpointing=True"):
        model.train()(input_ids=ids, labels=ids)
    torch.testing.assert_close(model.eval()(input_ids=ids, labels=ids).loss, expected)


def test_parameters_of_one_process_are_whole() -> None:
    tensor = torch.nn.Parameter(torch.ones(2))
    assert not is_sharded(tensor)
    copied = whole({"one": tensor})["one"]
    assert torch.equal(copied, tensor)
    assert not copied.requires_grad
    copied.zero_()
    assert tensor.sum() == 2


def test_saving_takes_the_arguments_of_accelerates_recipe(tmp_path: object) -> None:
    model = random_model(FAMILIES["llama"].build())
    moved = {name: tensor + 1 if name.endswith("key") else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, is_main_process=True, save_function=torch.save, state_dict=moved)
    loaded = type(model).from_pretrained(model.base, tmp_path).prefix_state_dict()
    for name, tensor in model.prefix_state_dict().items():
        assert torch.equal(loaded[name], tensor + 1 if name.endswith("key") else tensor), name
    model.save_pretrained(f"{tmp_path}/other", is_main_process=False, state_dict={})

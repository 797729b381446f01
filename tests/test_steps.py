from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import random_model, tokens

from peft_prefix import PrefixInputError, PrefixModel, PrefixWarning
from peft_prefix.steps import changes

KINDS: dict[str, dict[str, Any]] = {"plain": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def step(model: PrefixModel, **options: Any) -> None:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1, **options)
    model(input_ids=tokens(2, 5), labels=tokens(2, 5)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_is_seen_whatever_kind_of_optimizer_makes_it(kind: str, tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"].build())
    with torch.no_grad():
        cache = model(input_ids=tokens(1, 4), use_cache=True).past_key_values
    step(model, **KINDS[kind])
    with pytest.raises(PrefixInputError, match="cache"):
        model(input_ids=tokens(1, 1), past_key_values=cache)
    model.add_prefix("other", model.prefixes.entry().config)
    with pytest.warns(PrefixWarning, match="'default' have been trained and are not saved here"):
        model.save_pretrained(tmp_path)


def test_parameters_that_no_optimizer_changes_do_not_count() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [changes([one]) for one in parameters]
    parameters[0].grad = torch.ones(2)
    optimizer.step()
    after = [changes([one]) for one in parameters]
    assert after[0] > before[0]
    assert after[1] == before[1]
    with torch.no_grad():
        parameters[1].add_(1)
    assert changes([parameters[1]]) > after[1]

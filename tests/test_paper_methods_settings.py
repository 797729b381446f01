"""Methods as settings files describe them."""

from __future__ import annotations

from typing import Any

import pytest
from paper.methods import METHODS, method_from


def test_every_kind_is_known_by_its_name() -> None:
    assert list(METHODS) == (
        [
            "prefix",
            "fine_tuning",
            "top_layers",
            "adapter",
            "lora",
            "prompt_tuning",
            "prompting",
            "embedding_only",
            "infix",
        ]
    )
    assert {kind: method.trains for kind, method in METHODS.items() if not method.trains} == {"prompting": False}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="magic"), "one of prefix, fine_tuning, .*not 'magic'"),
        (dict(length=3), "A method has a kind"),
        (dict(kind="top_layers", counts=1), "has no field 'counts'. It has count."),
        (dict(kind="fine_tuning", count=1), "has no field 'count'. It has none."),
        (dict(kind="prefix", length="ten"), "length must be int, not 'ten'"),
        (dict(kind="prefix", length=True), "length must be int, not True"),
        (dict(kind="prefix", length=0), "at least 1"),
        (dict(kind="prefix", init="cache"), "init must be one of 'vocabulary', .*, not 'cache'"),
        (dict(kind="prefix", sites=["decoder", "tail"]), "sites must be a list of one of .* or nothing"),
        (dict(kind="prefix", init_text="banana"), "init_text is given"),
        (dict(kind="prefix", token_dropout=1), "token_dropout must be a number"),
        (dict(kind="adapter"), "either width"),
        (dict(kind="adapter", width=3, fraction=0.1), "either width"),
        (dict(kind="adapter", fraction=-0.1), "fraction must be above 0"),
        (dict(kind="lora", rank=0), "rank must be above 0"),
        (dict(kind="top_layers", count=0), "count must be above 0"),
        (dict(kind="prompting", shots=-1), "shots is 0 or more"),
        (dict(kind="prompting", end=""), "not empty"),
        (dict(kind="embedding_only", init_text="banana"), 'init="text" only'),
        (dict(kind="embedding_only", length=0), "length must be above 0"),
        (dict(kind="infix", length=0), "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_from(fields)


def test_lists_and_whole_numbers_are_read_as_they_are_meant() -> None:
    method: Any = method_from(dict(kind="prefix", sites=["encoder", "cross"], token_dropout=0))

    assert method.sites == ("encoder", "cross")

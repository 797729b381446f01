"""Model cards: what is generated, what it says, and that everything else stays as it was written."""

from __future__ import annotations

import dataclasses
import random
import re
import sys
from itertools import pairwise
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_training_record import full_record

from peft_prefix import PrefixConfig, PrefixConfigError, PrefixFileError
from peft_prefix.card_content import is_hub_id, shown
from peft_prefix.card_sections import sections
from peft_prefix.front_matter import FrontMatter
from peft_prefix.model_card import CardFacts, card_text, loss_curve_png
from peft_prefix.training_record import DataSet, Evaluation, TrainingRecord

ROUGE = EvalResult(
    task_type="text-generation",
    dataset_type="GEM/web_nlg",
    dataset_name="WebNLG",
    dataset_split="test",
    metric_type="rouge",
    metric_value=41.5,
)


def facts(folder: str = "webnlg", base: str | None = "me/base", **changes: Any) -> CardFacts:
    """All that can be known of a prefix."""
    config = PrefixConfig(num_virtual_tokens=10, base_model_name_or_path=base, modules_to_save=["score"])
    fields: dict[str, Any] = dict(
        config=config,
        repo_id="me/prefixes",
        folder=folder,
        sites=("encoder", "decoder"),
        numbers=230400,
        file_size=923456,
        dtype="float32",
        sha256="ab" * 32,
        training=full_record(evaluation_data=DataSet(name="GEM/e2e_nlg", split="validation", examples=64)),
        evaluation=(ROUGE,),
        pipeline_tag="text-generation",
    )
    return CardFacts(**{**fields, **changes})


def read(text: str) -> dict[str, Any]:
    """The metadata as huggingface_hub reads it, after it has found nothing to complain of.

    All cards of these tests come by here. What the Hub itself would say is asked by `card.validate()`, where there is
    one that can be reached.
    """
    card = ModelCard(text)
    data: dict[str, Any] = card.data.to_dict()
    again = ModelCard(str(card))  # written and read once more
    assert again.data.to_dict() == data
    assert again.text == card.text
    block = text.split("---")[1]
    names = [entry["name"] for entry in yaml.safe_load(block).get("model-index", [])]
    assert len(names) == len(set(names))
    return data


def test_a_new_card_says_everything() -> None:
    text = card_text(None, facts())
    assert read(text) == {
        "base_model": "me/base",
        "base_model_relation": "adapter",
        "datasets": ["GEM/e2e_nlg"],
        "library_name": "peft_prefix",
        "model-index": [
            {
                "name": "webnlg",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "GEM/e2e_nlg", "type": "GEM/e2e_nlg", "split": "validation"},
                        "metrics": [{"type": "loss", "value": 1.5, "name": "Loss"}],
                        "source": {"url": "https://huggingface.co/me/prefixes", "name": "peft_prefix"},
                    },
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "WebNLG", "type": "GEM/web_nlg", "split": "test"},
                        "metrics": [{"type": "rouge", "value": 41.5}],
                        "source": {"url": "https://huggingface.co/me/prefixes", "name": "peft_prefix"},
                    },
                ],
            }
        ],
        "pipeline_tag": "text-generation",
        "tags": ["prefix-tuning", "peft_prefix"],
    }
    for line in (
        "# prefixes",
        "<!-- peft_prefix: webnlg -->",
        "<!-- end of peft_prefix: webnlg -->",
        "## webnlg",
        "| base model | [me/base](https://huggingface.co/me/base) |",
        "| virtual tokens | 10 |",
        "| sites | `encoder`, `decoder` |",
        "| modules saved with it | `score` |",
        "| numbers | 230,400 |",
        "| size | 923 KB |",
        f"| sha256 | `{'ab' * 32}` |",
        'model = PrefixModel.from_pretrained("me/prefixes", subfolder="webnlg")  # loads its base model, too',
        'model = PrefixModel.from_pretrained(base, "me/prefixes", subfolder="webnlg")',
        "| data | [GEM/e2e_nlg](https://huggingface.co/datasets/GEM/e2e_nlg), configuration `default`, split `train`, "
        "2,000 examples |",
        "| steps | 300, of which the best model was kept, that of step 200 |",
        "| hardware | `Some Processor @ 2.00GHz`, 2 processes |",
        "| `learning_rate` | 0.03 |",
        "| metric | last, step 300 | best, step 200 |",
        "| `loss` | 1.75 | 1.5 |",
        "| `rouge1` | 40 | – |",
        "| `WebNLG` | `rouge` | 41.5 |",
        "| 200 | 0.3 | 1.5 |",
    ):
        assert line in text.splitlines(), line
    assert "![" not in text


def test_the_smallest_card() -> None:
    text = card_text(None, CardFacts(config=PrefixConfig()))
    assert read(text) == {"library_name": "peft_prefix", "tags": ["prefix-tuning", "peft_prefix"]}
    assert text.split("---\n", 2)[2].startswith("# Prefix\n\n<!-- peft_prefix: . -->\n\n## The prefix\n")
    assert "a local model" in text
    assert "loads its base" not in text
    assert "### " not in text
    assert 'PrefixModel.from_pretrained(base, "path/to/this/folder")' in text


@pytest.mark.parametrize("name", ["/home/me/base", "./base", "../base", "~/base", r"C:\base", "a/b/c", "a b", "", None])
def test_a_local_base_is_not_named(name: str | None) -> None:
    text = card_text(None, facts(base=name))
    assert "base_model" not in read(text)
    assert "base_model_relation" not in read(text)
    assert "for a local model, made" in text
    assert not name or f"`{name}`" not in text


@pytest.mark.parametrize("name", ["gpt2", "me/base", "HuggingFaceTB/SmolLM2-135M-Instruct", "a.b/c_d"])
def test_names_on_the_hub(name: str) -> None:
    assert is_hub_id(name)
    assert read(card_text(None, facts(base=name)))["base_model"] == name


def test_nothing_about_a_repository_is_claimed_while_there_is_none() -> None:
    text = card_text(None, facts(repo_id=None))
    assert "model-index" not in read(text)
    assert "| `WebNLG` | `rouge` | 41.5 |" in text
    assert 'from_pretrained("path/to/this/folder", subfolder="webnlg")' in text
    uploaded = card_text(text, facts())
    assert read(uploaded)["model-index"][0]["name"] == "webnlg"


def test_a_result_needs_a_task_data_and_the_same_numbers() -> None:
    record = facts().training
    assert record is not None
    for known in (
        facts(evaluation=(), pipeline_tag=None),
        facts(evaluation=(), training=dataclasses.replace(record, kept_step=299)),
        facts(evaluation=(), training=dataclasses.replace(record, evaluation_data=DataSet(examples=3))),
        facts(evaluation=(), training=None),
    ):
        assert "model-index" not in read(card_text(None, known))


def test_a_task_that_somebody_named_stays() -> None:
    assert read(card_text("---\npipeline_tag: summarization\n---\n", facts()))["pipeline_tag"] == "summarization"
    assert "pipeline_tag" not in read(card_text(None, facts(pipeline_tag=None)))


def test_each_prefix_has_a_section_of_its_own() -> None:
    text = None
    for folder in ("webnlg", "e2e", "", "deep/er"):
        text = card_text(text, facts(folder, base=f"me/base-{folder.split('/')[0] or 'root'}"))
    assert text is not None
    body = text.split("---\n", 2)[2]
    assert [section.label for section in sections(body)] == ["webnlg", "e2e", ".", "deep/er"]
    data = yaml.safe_load(text.split("---")[1])
    assert data["base_model"] == ["me/base-webnlg", "me/base-e2e", "me/base-root", "me/base-deep"]
    assert [entry["name"] for entry in data["model-index"]] == ["webnlg", "e2e", "prefixes", "deep/er"]
    changed = card_text(text, facts("e2e", base="me/base-e2e", numbers=7, evaluation=()))
    own = next(one for one in sections(changed) if one.label == "e2e")
    old = next(one for one in sections(text) if one.label == "e2e")
    assert "| numbers | 7 |" in changed[own.start : own.end]
    assert changed[own.end :] == text[old.end :]
    after = yaml.safe_load(changed.split("---")[1])
    assert [len(entry["results"]) for entry in after["model-index"]] == [2, 1, 2, 2]
    assert {**after, "model-index": None} == {**data, "model-index": None}


def test_a_prefix_on_another_base_renames_it() -> None:
    two = card_text(card_text("---\nbase_model: users/own\n---\n", facts("a", base="me/old")), facts("b", base="me/b"))
    assert read(two)["base_model"] == ["users/own", "me/old", "me/b"]
    assert read(card_text(two, facts("a", base="me/new")))["base_model"] == ["users/own", "me/b", "me/new"]
    shared = card_text(two, facts("b", base="me/old"))
    assert read(card_text(shared, facts("a", base="me/new")))["base_model"] == ["users/own", "me/old", "me/new"]
    one = card_text(None, facts("a", base="me/old"))
    assert read(card_text(one, facts("a", base="/local")))  # the metadata names none any more
    assert "base_model" not in read(card_text(one, facts("a", base="/local")))


def test_results_that_others_wrote_stay() -> None:
    mine = {
        "task": {"type": "text-generation"},
        "dataset": {"type": "GEM/web_nlg", "name": "WebNLG", "split": "test"},
        "metrics": [{"type": "bleu", "value": 50.0}],
    }
    index = [{"name": "other", "results": [mine]}, {"name": "webnlg", "results": [mine]}]
    text = f"---\n{yaml.safe_dump({'model-index': index})}---\n"
    first = card_text(text, facts())
    again = card_text(first, facts(evaluation=(dataclasses.replace(ROUGE, metric_value=42.0),)))
    for card, rouge in ((first, 41.5), (again, 42.0)):
        found = yaml.safe_load(card.split("---")[1])["model-index"]
        assert [entry["name"] for entry in found] == ["other", "webnlg"]
        assert found[0] == index[0]
        assert found[1]["results"][0] == mine
        _, results = model_index_to_eval_results(found[1:])
        expected = [("bleu", 50.0), ("loss", 1.5), ("rouge", rouge)]
        assert [(one.metric_type, one.metric_value) for one in results] == expected


FRONT = """language: no  # Norwegian, not false
license: "apache-2.0"
# what I like
widget:
- text: 'Hello: you'
  other: [1,   2]
tags:
# mine
- summarization
- prefix-tuning

extra_gated_fields: {Name: text, Date: 2026-01-01}
datasets: mine/data"""


def test_the_front_matter_of_the_user_stays_as_it_is_written() -> None:
    text = card_text(f"---\n{FRONT}\n---\nMy text.", facts())
    expected = FRONT.replace(
        "tags:\n# mine\n- summarization\n- prefix-tuning\n", "tags:\n- summarization\n- prefix-tuning\n- peft_prefix\n"
    )
    expected = expected.replace("datasets: mine/data", "datasets:\n- mine/data\n- GEM/e2e_nlg")
    assert text.startswith(f"---\n{expected}\nbase_model: me/base\n")
    assert "---\nMy text.\n\n<!-- peft_prefix: webnlg -->\n" in text
    assert read(text)["license"] == "apache-2.0"
    assert card_text(text, facts()) == text


@pytest.mark.parametrize(
    "block",
    [
        "{language: en, tags: [a], license: mit}",
        "common: &a [x]\ntags: *a\nother: *a",
        "tags: &a [x]\nother: *a",
        "tags: [a,\n  b]\nlanguage: en",
        "? tags\n: - a\nlanguage: en",
        "tags: >\n  folded\nlanguage: en",
        "tags:\nlanguage: en",
        "  tags: a\n  language: en",
        "'tags': a",
        "number: .nan\ntags: a",
        "language: en\n...",
        "# nothing",
        "",
    ],
)
def test_any_way_to_write_metadata_is_understood(block: str) -> None:
    before = yaml.safe_load(block) or {}
    text = card_text(f"---\n{block}\n---\nText.\n", facts())
    after = yaml.safe_load(text.split("---")[1])
    for key, value in before.items():
        if key == "tags":
            given = value if isinstance(value, list) else [] if value is None else [value]
            assert after["tags"] == [*given, "prefix-tuning", "peft_prefix"]
        else:
            assert repr(after[key]) == repr(value)
    assert after["library_name"] == "peft_prefix"
    assert card_text(text, facts()) == text or ".nan" in block


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\ntags: [a\n---\n", "is not valid YAML"),
        ("---\nday: 2026-99-99\n---\n", "is not valid YAML"),
        ("---\n- a\n- b\n---\n", "lines of 'key: value'"),
        ("---\nJust text.\n---\n", r"or write '\*\*\*' for a line"),
        ("---\ntags: a\ntags: b\n---\n", "keys twice: tags"),
        ("---\nlicense: mit\n\n# Title\n", "the line '---' that ends it is missing"),
        ("---\ntags: {a: b}\n---\n", "'tags' in the metadata .* must be one value or a list"),
        ("---\nmodel-index: text\n---\n", "'model-index' in the metadata .* is not valid"),
        ("---\nmodel-index:\n- name: x\n---\n", "'model-index' in the metadata .* is not valid"),
        ("---\nmodel-index:\n- name: x\n  results:\n  - task: {type: a}\n---\n", "'model-index' .* is not valid"),
    ],
)
def test_broken_metadata_is_an_error_that_says_what_to_do(text: str, message: str) -> None:
    with pytest.raises(PrefixFileError, match=message):
        card_text(text, facts())


@pytest.mark.parametrize("text", ["---\n\nA line, then text: this.\n", "--- not metadata\n", "----\n", "\n\n---\n"])
def test_lines_across_the_page_are_text(text: str) -> None:
    card = card_text(text, facts())
    assert f"---\n{text}" in card
    assert card_text(card, facts()) == card


PIECES = [
    *("\n", "\n\n", " ", "\t", "\r\n", "---\n", "\n---\n", "# Title\n", "Text.", "ünïcode 🤗", "a: b\n", "```\n"),
    *("|", "\\", "<!-- peft_prefix: webnlg -->\n", "<!-- end of peft_prefix: webnlg -->\n"),
    *("<!-- end of peft_prefix: e2e -->", "<!-- peft_prefix: e2e -->\n", "<!-- peft_prefix: webnlg (2) -->\n"),
    *("<!-- a comment -->\n", "<!-- peft_prefix: x"),
]


@pytest.mark.parametrize("seed", range(60))
def test_all_text_of_the_user_survives(seed: int) -> None:
    generator = random.Random(seed)

    def text() -> str:
        return f"[{generator.random()}]" + "".join(generator.choices(PIECES, k=generator.randrange(8))) + "[]"

    own = [text() for _ in range(4)]
    # Between markers of the same name without another one between, text would be generated: that is what they say.
    half = "<!-- peft" if generator.random() < 0.5 else "<!-- end"
    own = [one.replace(half, "<-- half") for one in own]
    card = own[0]
    for number, folder in enumerate(("webnlg", "e2e", "webnlg")):
        card = card_text(card, facts(folder, numbers=number))
        assert card_text(card, facts(folder, numbers=number)) == card
        # The user moves a section, damages one, and writes more.
        found = list(sections(card))
        assert {"webnlg", folder} <= {one.label for one in found}
        one = generator.choice(found)
        if generator.random() < 0.5:
            card = card[: one.start] + card[one.end :] + "\n" + card[one.start : one.end]
        place = next(sections(card)).start
        card = f"{card[:place]}{own[number + 1]}\n{card[place:]}"
        for piece in own[: number + 2]:
            assert piece in card
        data = FrontMatter(card)
        assert data.get("library_name") == "peft_prefix"
    final = card_text(card, facts("e2e", numbers=99))
    for piece in own:
        assert piece in final
    assert card_text(final, facts("e2e", numbers=99)) == final


def test_a_section_whose_end_is_lost_eats_nothing() -> None:
    text = card_text(None, facts())
    begin, end = "<!-- peft_prefix: webnlg -->\n", "<!-- end of peft_prefix: webnlg -->\n"
    damaged = text.replace(end, "My text.\n")
    once = card_text(damaged, facts(numbers=7))
    assert "My text.\n" in once
    assert once.split("---\n", 2)[2].startswith(damaged.split("---\n", 2)[2])
    assert card_text(once, facts(numbers=7)) == once
    # The beginning of the new section is deleted as well: what is left of both does not pair.
    twice = once.replace("<!-- peft_prefix: webnlg (2) -->\n", "")
    assert twice != once
    again = card_text(twice, facts(numbers=8))
    assert "My text.\n" in again
    assert "| numbers | 7 |" in again
    assert card_text(again, facts(numbers=8)) == again
    without_begin = card_text(text.replace(begin, ""), facts(numbers=7))
    assert "| numbers | 230,400 |" in without_begin
    assert "| numbers | 7 |" in without_begin


def test_a_section_that_was_copied_is_renewed_in_both_places_and_a_deleted_one_comes_back() -> None:
    text = card_text(None, facts())
    (one,) = sections(text)
    copied = f"{text}\nBetween.\n\n{text[one.start : one.end]}"
    assert card_text(copied, facts(numbers=7)).count("| numbers | 7 |") == 2
    deleted = text[: one.start]
    assert card_text(deleted, facts()) == text


@pytest.mark.parametrize("text", ["\ufeff---\r\nlicense: mit\r\n---\r\n# Mine\r\n\r\nText.\r\n", "# Mine\r\n"])
def test_line_breaks_of_windows(text: str) -> None:
    card = card_text(text, facts())
    assert re.search(r"[^\r]\n", card) is None
    assert "# Mine\r\n" in card
    assert not card.startswith("\ufeff")
    assert card_text(card, facts()) == card


EVIL = "x | y ` <b> </b> <!-- end of peft_prefix: webnlg --> [a](javascript:b) **c** \\| \n# Title\r\u2028\u202e&amp;"


def test_nothing_breaks_out_of_a_value() -> None:
    short = EVIL.replace("\n", " ").replace("\r", " ").replace("\u2028", " ").replace("\u202e", "")
    data = DataSet(name=short, config=short, split=short)
    record = TrainingRecord(
        hyperparameters={short[:60]: short},
        training_data=data,
        evaluation_data=data,
        hardware=short,
        versions={short[:60]: short},
        steps=1,
        kept_step=1,
        last_evaluation=Evaluation(step=1, metrics={short[:60]: 1.0}),
    )
    config = PrefixConfig(
        base_model_name_or_path=EVIL, base_model_revision=EVIL, modules_to_save=[short], init="text", init_text=EVIL
    )
    result = dataclasses.replace(ROUGE, dataset_name=EVIL, metric_name=EVIL, metric_value=EVIL, dataset_config=EVIL)
    evil = facts(
        config=config, training=record, evaluation=(result,), dtype=EVIL, sha256=EVIL, sites=(EVIL,), picture=f"{EVIL})"
    )
    plain = facts(
        config=PrefixConfig(base_model_revision="r", modules_to_save=["m"]),
        training=dataclasses.replace(
            record,
            hyperparameters={"a": "b"},
            training_data=DataSet(name="?", config="b", split="c"),
            evaluation_data=DataSet(name="?", config="b", split="c"),
            hardware="c",
            versions={"a": "b"},
            last_evaluation=Evaluation(step=1, metrics={"a": 1.0}),
        ),
        picture="p",
    )
    text = card_text(None, evil)
    read(text)
    assert card_text(text, evil) == text
    assert len(list(sections(text))) == 1
    body, expected = text.split("---\n", 2)[2], card_text(None, plain).split("---\n", 2)[2]
    assert len(body.splitlines()) == len(expected.splitlines())
    for line, like in zip(body.splitlines(), expected.splitlines(), strict=True):
        assert line.count("|") == like.count("|"), line
        assert line.count("<") == like.count("<"), line
        assert line.startswith("#") == like.startswith("#"), line
    assert "](javascript" not in body
    assert "**" not in body
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        ("", "–"),
        ("a_b*c*", "`a_b*c*`"),
        ("a`b", "a&#96;b"),
        ("a|b", "a&#124;b"),
        ("a\nb", "`a b`"),
        ("<i>é", "&#60;i&#62;é"),
    ],
)
def test_values_in_tables(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize("folder", ["../x", "/x", "a//b", "a b", "a\n", "x -->", ".", ".hidden", "a/"])
def test_folders_that_cannot_be(folder: str) -> None:
    with pytest.raises(PrefixConfigError, match="folder of a prefix in a repository"):
        facts(folder)


@pytest.mark.parametrize("repository", ["a/b/c", 'x")', "../x", ""])
def test_repositories_that_cannot_be(repository: str) -> None:
    with pytest.raises(PrefixConfigError, match='named like "user/name"'):
        facts(repo_id=repository)


def test_at_most_ten_points_of_the_curve_are_written_out() -> None:
    record = full_record(
        training_losses=[(step, 1.0 / step) for step in range(1, 200)],
        evaluation_losses=[(step, 2.0 / step) for step in range(5, 200, 5)],
    )
    text = card_text(None, facts(training=record, picture="webnlg/loss_curve.png"))
    table = (
        text.split("| step | training loss | evaluation loss |\n| --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()
    )
    assert len(table) == 10
    assert table[0] == "| 5 | 0.2 | 0.4 |"
    assert table[-1] == "| 195 | 0.005128 | 0.01026 |"
    steps = [int(line.split("|")[1]) for line in table]
    assert all(later > earlier for earlier, later in pairwise(steps))
    assert "![Training and evaluation loss over steps](webnlg/loss_curve.png)" in text


def test_a_picture_of_the_losses() -> None:
    pytest.importorskip("matplotlib")
    before = sys.modules.get("matplotlib.pyplot")
    picture = loss_curve_png(full_record())
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert loss_curve_png(full_record()) == picture
    assert sys.modules.get("matplotlib.pyplot") is before
    assert loss_curve_png(full_record(training_losses=(), evaluation_losses=((1, 1.0), (2, 1.0)))) is not None


def test_no_picture_of_one_point_or_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loss_curve_png(full_record(training_losses=((1, 1.0),), evaluation_losses=((1, 1.0),))) is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert loss_curve_png(full_record()) is None


def test_numbers_that_cannot_be_drawn_give_no_picture() -> None:
    pytest.importorskip("matplotlib")
    wild = TrainingRecord(
        steps=2**53,
        kept_step=2**53,
        training_losses=((0, -1.7e308), (2**53, 1.7e308)),
        evaluation_losses=((0, 1e-320), (1, 1.7e308)),
    )
    picture = loss_curve_png(wild)
    assert picture is None or picture.startswith(b"\x89PNG")


def test_metadata_that_would_grow_are_refused() -> None:
    levels = [f"a{level + 1}: &a{level + 1} [{', '.join([f'*a{level}'] * 9)}]" for level in range(9)]
    bomb = "\n".join(["a0: &a0 [x]", *levels])
    with pytest.raises(PrefixFileError, match="values, with those that it repeats"):
        card_text(f"---\n{bomb}\ntags: *a9\n---\n", facts())
    for text in ("[" * 20_000, "x: &a [*a]", "x: !!bool maybe", "x: !!int ''", "y: " + "1" * 300_000):
        with pytest.raises(PrefixFileError, match="not valid YAML"):
            card_text(f"---\n{text}\n---\n", facts())

"""Several prefixes on one base: adding, loading, switching, removing, and naming one for each row."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import assert_close, random_model, source_of, tokens
from test_conformance_rows import LENGTHS, bank_of
from transformers import DynamicCache

from peft_prefix import (
    IncompatibleBaseError,
    PrefixConfig,
    PrefixConfigError,
    PrefixInputError,
    PrefixModel,
    PrefixWarning,
    UnsupportedModelError,
    get_prefix_model,
)
from peft_prefix.parameterization import StoredPrefix

GREEDY: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)


def llama_bank(**config: Any) -> PrefixModel:
    return bank_of(FAMILIES["llama"].build(), **config)


def saved(model: PrefixModel, folder: Path) -> dict[str, Path]:
    """Each prefix of a model in a folder of its own."""
    for name in model.prefixes:
        model.save_pretrained(folder / name, prefix_name=name)
    return {name: folder / name for name in model.prefixes}


def test_unknown_names_fail_before_anything_is_computed() -> None:
    model = llama_bank()
    passes: list[int] = []
    model.base.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    text = tokens(2, 5)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (["long", "lnog"], PrefixConfigError, "no prefix 'lnog'; there are 'long', 'other', 'short'"),
        (["long"], PrefixInputError, "1 names for 2 rows"),
        (["long", "short", None], PrefixInputError, "3 names for 2 rows"),
        ([], PrefixInputError, "empty"),
        ("long", PrefixInputError, "a list with one name for each row"),
        (7, PrefixInputError, "a list with one name for each row"),
        ({"long", "short"}, PrefixInputError, "a list with one name for each row"),
        ({"long": 1, "short": 2}, PrefixInputError, "a list with one name for each row"),
        (["long", 7], PrefixInputError, "a string, or None for a row without a prefix, not 7"),
    ]
    for names, error, message in wrong:
        for call in (model, model.generate, model.base_model):
            with pytest.raises(error, match=message):
                call(input_ids=text, prefix_names=names)
        with pytest.raises(error, match=message):
            model.generate(text, prefix_names=names)
    with pytest.raises(PrefixConfigError, match="No prefix is active"):
        model(input_ids=text)
    with pytest.raises(PrefixConfigError, match="No prefix is active"):
        model.generate(text)
    assert not passes


def test_names_that_cannot_name_a_folder_and_names_that_are_taken() -> None:
    model = llama_bank()
    with pytest.raises(PrefixConfigError, match="a training checkpoint"):
        model.add_prefix("checkpoint-3", PrefixConfig(num_virtual_tokens=2, init="zeros"))
    for name in ("", "a/b", "..", "a b", "ä", "x" * 101, None, 3, "a\n", ".hidden"):
        with pytest.raises(PrefixConfigError, match="letters, digits"):
            model.add_prefix(name, PrefixConfig(num_virtual_tokens=2, init="zeros"))  # type: ignore[arg-type]
    with pytest.raises(PrefixConfigError, match="'long' already"):
        model.add_prefix("long", PrefixConfig(num_virtual_tokens=2, init="zeros"))
    with pytest.raises(PrefixConfigError, match="something else in Python"):
        model.add_prefix("keys", PrefixConfig(num_virtual_tokens=2, init="zeros"))
    assert list(model.prefixes) == list(LENGTHS)


def test_removing() -> None:
    model = llama_bank()
    model.set_prefix("long")
    with pytest.raises(PrefixConfigError, match=r"'long' is the active prefix.*set_prefix\(None\)"):
        model.remove_prefix("long")
    with pytest.raises(PrefixConfigError, match="no prefix 'nobody'"):
        model.remove_prefix("nobody")
    model.remove_prefix("short")
    assert list(model.prefixes) == ["long", "other"]
    with pytest.raises(PrefixConfigError, match="no prefix 'short'"):
        model.set_prefix("short")
    assert model.active_prefix == "long"
    assert not any("short" in name for name in model.state_dict())
    model.set_prefix(None)
    model.remove_prefix("long")
    model.remove_prefix("other")
    with pytest.raises(PrefixConfigError, match="no prefix yet"):
        model(input_ids=tokens(1, 3))


def test_a_prefix_that_takes_a_removed_ones_name_is_another_one() -> None:
    model = llama_bank()
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=tokens(1, 4), past_key_values=cache, prefix_names=["short"])
        model.remove_prefix("short")
        model.add_prefix("short", PrefixConfig(num_virtual_tokens=2, init="zeros"))
        with pytest.raises(PrefixInputError, match="cannot be continued"):
            model(input_ids=tokens(1, 4), past_key_values=cache, prefix_names=["short"])


def test_nothing_is_copied_or_rebuilt(tmp_path: Path) -> None:
    model = llama_bank()
    folders = saved(model, tmp_path)
    loaded = PrefixModel.from_pretrained(model.base, folders["long"], name="long")
    before = {name: (id(one), one.data_ptr(), one._version) for name, one in loaded.base.named_parameters()}
    modules = [id(module) for module in loaded.base.modules()]
    loaded.load_prefix(folders["short"], "short")
    loaded.add_prefix("new", PrefixConfig(num_virtual_tokens=3, init="normal"))
    for name in ("long", "short", "new", None):
        loaded.set_prefix(name)
        loaded(input_ids=tokens(2, 4), prefix_names=["long", "new"])
    loaded.remove_prefix("new")
    assert {name: (id(one), one.data_ptr(), one._version) for name, one in loaded.base.named_parameters()} == before
    assert [id(module) for module in loaded.base.modules()] == modules


def test_training_touches_the_active_prefix_only() -> None:
    model = llama_bank().train()
    model.set_prefix("short")
    model(input_ids=tokens(2, 6), labels=tokens(2, 6)).loss.backward()
    learning = {name.split(".")[0] for name, one in model.prefixes.named_parameters() if one.grad is not None}
    assert learning == {"short"}


def test_a_row_without_a_prefix_is_the_base(tmp_path: Path) -> None:
    model = llama_bank()
    text = tokens(3, 6)
    with torch.no_grad():
        expected = model.base(input_ids=text).logits
        assert torch.equal(model(input_ids=text, prefix_names=[None] * 3).logits, expected)
        with model.disable_prefix():
            assert torch.equal(model(input_ids=text, prefix_names=["long", None, "short"]).logits, expected)
            with pytest.raises(PrefixConfigError, match="no prefix 'lnog'"):
                model(input_ids=text, prefix_names=["lnog", None, None])
    assert torch.equal(model.generate(text, **GREEDY, prefix_names=[None] * 3), model.base.generate(text, **GREEDY))


def test_equal_names_are_the_active_prefix() -> None:
    model, cache = llama_bank(), DynamicCache()
    text = tokens(2, 8)
    with torch.no_grad():
        model(input_ids=text[:, :5], past_key_values=cache, prefix_names=["long", "long"])
        model.set_prefix("long")
        continued = model(input_ids=text[:, 5:], past_key_values=cache).logits
        assert_close(continued, model(input_ids=text).logits[:, 5:])


def test_several_turns_with_a_prefix_for_each_row() -> None:
    model, names = llama_bank(), ["long", None, "short"]
    text = tokens(3, 8)
    first = model.generate(text, **GREEDY, prefix_names=names, return_dict_in_generate=True)
    history = torch.cat([first.sequences, tokens(3, 3, seed=5)], dim=1)
    mask = torch.ones_like(history)
    options = dict(GREEDY, attention_mask=mask, prefix_names=names)
    expected = model.generate(history, **options)
    wrong = copy.deepcopy(first.past_key_values)
    assert torch.equal(model.generate(history, **options, past_key_values=first.past_key_values), expected)
    with pytest.raises(PrefixInputError, match="cannot be continued"):
        model.generate(history, **{**options, "prefix_names": ["long", "long", "short"]}, past_key_values=wrong)


def test_encodings_belong_to_the_prefixes_of_their_rows() -> None:
    model, names = bank_of(FAMILIES["bart"].build()), ["long", None, "short"]
    source, text = source_of(model.base, 3), tokens(3, 5)
    with torch.no_grad():
        encoded = model.get_encoder()(**source, prefix_names=names)
        arguments = dict(encoder_outputs=encoded, attention_mask=source["attention_mask"], decoder_input_ids=text)
        expected = model(**source, decoder_input_ids=text, prefix_names=names).logits
        assert_close(model(**arguments, prefix_names=names).logits, expected)
        with pytest.raises(PrefixInputError, match="were made with prefix"):
            model(**arguments, prefix_names=["short", None, "long"])
    generated = model.generate(**source, **GREEDY, prefix_names=names)
    again = dict(encoder_outputs=encoded, attention_mask=source["attention_mask"])
    assert torch.equal(model.generate(**again, **GREEDY, prefix_names=names), generated)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_sites_may_differ_between_rows(family: str) -> None:
    model = random_model(FAMILIES[family].build(), p=3)
    sites: dict[str, tuple[str, ...]] = {
        "encoder": ("encoder",),
        "decoder": ("decoder",),
        "both": ("decoder", "cross"),
        "all": ("encoder", "decoder", "cross"),
    }
    for seed, (name, own) in enumerate(sites.items()):
        config = PrefixConfig(num_virtual_tokens=2 + seed, init="normal", init_std=1.0, init_seed=seed, sites=own)
        model.add_prefix(name, config)
    names, source, text = [*sites, None], source_of(model.base, 5), tokens(5, 6)
    with torch.no_grad():
        together = model(**source, decoder_input_ids=text, prefix_names=names).logits
        for row, name in enumerate(names):
            one = {key: value[row : row + 1] for key, value in source.items()}
            alone = model(**one, decoder_input_ids=text[row : row + 1], prefix_names=[name]).logits
            assert_close(together[row : row + 1], alone)


def test_windows_may_differ_between_rows() -> None:
    base = FAMILIES["gemma3_text"].build()
    model = random_model(base, p=4, init_seed=1)
    for name, p, sliding in (("pinned", 5, "pinned"), ("plain", 3, "plain"), ("plain_too", 5, "plain")):
        model.add_prefix(
            name,
            PrefixConfig(num_virtual_tokens=p, init="normal", init_std=1.0, sliding_window=sliding),  # type: ignore[arg-type]
        )
    text = tokens(3, 20)
    with torch.no_grad():
        for names in (["pinned", "plain", None], ["pinned", "plain_too", "pinned"], ["plain_too", "plain", "plain"]):
            together = model(input_ids=text, prefix_names=names).logits
            for row, name in enumerate(names):
                assert_close(together[row : row + 1], model(input_ids=text[row : row + 1], prefix_names=[name]).logits)


def test_each_row_has_its_prefixs_own_dropout() -> None:
    model = bank_of(FAMILIES["llama"].build(), {"long": 5, "short": 2}).train()
    model.add_prefix("often", PrefixConfig(num_virtual_tokens=5, init="normal", init_std=1.0, dropout=0.9))
    model.set_prefix(None)
    text = tokens(1, 6).expand(4, -1)
    with torch.no_grad():
        logits = model(input_ids=text, prefix_names=["long", "long", "often", "often"]).logits
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[2], logits[3], atol=1e-3)


def test_every_row_has_its_own_classifier() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = dict(FAMILIES["llama"].kwargs, num_labels=3)
    base = LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()  # type: ignore[arg-type]
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=3, init="normal", init_std=1.0))
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=5, init="normal", init_std=1.0))
    model.add_prefix("headless", PrefixConfig(num_virtual_tokens=5, init="normal", init_std=1.0, modules_to_save=()))
    with torch.no_grad():
        for name in ("default", "other"):
            model.prefixes.entry(name).weights.get_parameter("score.weight").normal_()
    text, names = tokens(5, 7), ["other", "default", None, "headless", "other"]
    labels = torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        together = model(input_ids=text, prefix_names=names).logits
        for row, name in enumerate(names):
            alone = model(input_ids=text[row : row + 1], prefix_names=[name]).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)
    model.train()(input_ids=text, labels=labels, prefix_names=names).loss.backward()
    for name in ("default", "other"):
        assert model.prefixes.entry(name).weights.get_parameter("score.weight").grad is not None
    assert base.score.weight.grad is None


def test_saving_one_prefix_or_all(tmp_path: Path) -> None:
    model = llama_bank()
    states = {name: model.prefix_state_dict(name) for name in LENGTHS}
    with torch.no_grad():
        for parameter in model.prefixes.parameters():
            parameter.add_(1.0)
    with pytest.warns(PrefixWarning, match="'short', 'other' have been trained and are not saved here"):
        model.save_pretrained(tmp_path / "one", prefix_name="long")
    model.save_pretrained(tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir()} == {*LENGTHS, "README.md"}
    loaded = PrefixModel.from_pretrained(model.base, tmp_path / "one")
    loaded.load_prefix(tmp_path / "all", "short", subfolder="short")
    for name, own in (("default", "long"), ("short", "short")):
        for key, tensor in loaded.prefix_state_dict(name).items():
            assert torch.equal(tensor, states[own][key] + 1.0)
    with pytest.raises(PrefixConfigError, match="no prefix 'nobody'"):
        model.save_pretrained(tmp_path / "none", prefix_name="nobody")
    assert not (tmp_path / "none").exists()


def test_a_frozen_prefix_is_as_small_as_its_file_and_is_no_parameter(tmp_path: Path) -> None:
    model = llama_bank()
    model.save_pretrained(tmp_path, prefix_name="long", dtype=torch.bfloat16)
    loaded = PrefixModel.from_pretrained(model.base, tmp_path, name="rounded")
    module = loaded.prefixes["rounded"]
    assert isinstance(module, StoredPrefix)
    assert {rows.dtype for rows in module.stored.values()} == {torch.bfloat16}
    assert not list(module.parameters())
    assert not [name for name in loaded.state_dict() if not name.endswith("_extra_state")]
    with pytest.raises(PrefixInputError, match="is_trainable=True"):
        module.requires_grad_(True)
    text = tokens(2, 6)
    with torch.no_grad():
        rounded = {key: tensor.bfloat16().float() for key, tensor in model.prefix_state_dict("long").items()}
        model.prefixes["long"].start_from(rounded)  # type: ignore[operator]
        assert_close(loaded(input_ids=text).logits, model(input_ids=text, prefix_names=["long"] * 2).logits)
    loaded.save_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert (tmp_path / "again" / "prefix.safetensors").read_bytes()[-1000:] == (
        tmp_path / "prefix.safetensors"
    ).read_bytes()[-1000:]


def test_a_prefix_may_stay_where_it_is(tmp_path: Path) -> None:
    model = llama_bank()
    folders = saved(model, tmp_path)
    loaded = PrefixModel.from_pretrained(model.base, folders["long"], name="long")
    loaded.load_prefix(folders["short"], "short", device="cpu")
    with pytest.raises(PrefixConfigError, match="leave device out"):
        loaded.load_prefix(folders["other"], "other", device="cpu", is_trainable=True)
    loaded.to(torch.float64)  # what moves a model moves what goes with it
    dtypes = {name: next(iter(loaded.prefixes[name].stored.values())).dtype for name in ("long", "short")}  # type: ignore[union-attr]
    assert dtypes == {"long": torch.float64, "short": torch.float32}
    loaded.to(torch.float32)


def test_a_prefix_of_another_base_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    folders = saved(llama_bank(), tmp_path)
    other = random_model(FAMILIES["qwen3"].build())
    with pytest.raises(IncompatibleBaseError, match="does not fit"):
        other.load_prefix(folders["long"], "long")
    assert list(other.prefixes) == ["default"]
    assert list(other.prefixes.entries) == ["default"]


def test_a_base_that_counts_in_its_own_way_says_so() -> None:
    model = bank_of(FAMILIES["prophetnet"].build())
    source, text = source_of(model.base, 2), tokens(2, 5)
    with pytest.raises(UnsupportedModelError, match="a prefix of the same length"):
        model(**source, decoder_input_ids=text, prefix_names=["long", "short"])
    with pytest.raises(UnsupportedModelError, match="a prefix of the same length"):
        model.generate(**source, **GREEDY, prefix_names=["long", None])
    model(**source, decoder_input_ids=text, prefix_names=["long", "long"])


def test_the_compiled_model_reads_a_prefix_for_each_row() -> None:
    model = llama_bank()
    text, names = tokens(3, 9), ["long", None, "short"]
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert_close(
            compiled(input_ids=text, prefix_names=names).logits, model(input_ids=text, prefix_names=names).logits
        )
        other = ["short", "other", None]
        assert_close(
            compiled(input_ids=text, prefix_names=other).logits, model(input_ids=text, prefix_names=other).logits
        )


def test_prefixes_come_and_go_while_others_are_served(tmp_path: Path) -> None:
    model = llama_bank()
    folders = saved(model, tmp_path)
    text, names = tokens(3, 6), ["long", None, "short"]
    expected = model.generate(text, **GREEDY, prefix_names=names)
    failures: list[BaseException] = []
    done = threading.Event()

    def come_and_go() -> None:
        try:
            while not done.is_set():
                for number in range(5):
                    model.load_prefix(folders["other"], f"user-{number}")
                for number in range(5):
                    model.remove_prefix(f"user-{number}")
        except BaseException as error:  # noqa: BLE001 - shown by the test's own thread
            failures.append(error)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(15):
            assert torch.equal(model.generate(text, **GREEDY, prefix_names=names), expected)
    finally:
        done.set()
        thread.join()
    assert not failures
    assert list(model.prefixes) == list(LENGTHS)


def test_what_runs_with_a_prefix_goes_on_when_it_is_removed() -> None:
    model = llama_bank()
    text, names = tokens(2, 6), ["long", "short"]
    expected = model.generate(text, **GREEDY, prefix_names=names)

    class Removing:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if "short" in model.prefixes:
                model.remove_prefix("short")
            return scores

    assert torch.equal(model.generate(text, **GREEDY, prefix_names=names, logits_processor=[Removing()]), expected)


def test_a_removed_prefix_leaves_memory() -> None:
    model = llama_bank()
    module = model.prefixes["short"]
    import weakref

    reference = weakref.ref(module)
    model(input_ids=tokens(2, 4), prefix_names=["long", "short"])
    del module
    model.remove_prefix("short")
    gc.collect()
    assert reference() is None


def test_a_generation_without_a_prompt_has_one_row() -> None:
    model = llama_bank()
    expected = model.generate(**GREEDY, prefix_names=["long"])
    model.set_prefix("long")
    assert torch.equal(model.generate(**GREEDY), expected)
    for names in (["long", "short"], ["long"] * 3):
        with pytest.raises(PrefixInputError, match="names for 1 rows"):
            model.generate(max_new_tokens=3, num_return_sequences=2, do_sample=True, prefix_names=names)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2_5_vl"])
def test_packed_texts_stay_apart_in_mixed_rows(family: str) -> None:
    model = bank_of(FAMILIES[family].build())
    text, positions = tokens(3, 12), torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    names = ["long", None, "short"]
    with torch.no_grad():
        packed = model(input_ids=text, position_ids=positions, use_cache=False, prefix_names=names).logits
        for part in (slice(0, 5), slice(5, 12)):
            alone = model(input_ids=text[:, part], use_cache=False, prefix_names=names).logits
            assert_close(packed[:, part], alone)


def test_rows_that_leave_a_batch_on_the_way_are_an_error() -> None:
    """As recordings do of which Whisper has heard the end."""
    model = bank_of(FAMILIES["whisper"].build())
    source, names = source_of(model.base, 2), ["long", "short"]

    class Leaving:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            first = {name: value[:1] for name, value in source.items()}
            model.base(**first, decoder_input_ids=tokens(2, 3)[:1].expand(2, -1), encoder_outputs=encoded)
            return scores

    with torch.no_grad():
        encoded = model.get_encoder()(**source, prefix_names=names)
    with pytest.raises(PrefixInputError, match=r"goes on with 2 rows where it began with 4.*one by one"):
        model.generate(**source, **GREEDY, num_beams=2, prefix_names=names, logits_processor=[Leaving()])


def test_a_frozen_classifier_is_in_no_training_state(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    base = LlamaForSequenceClassification(LlamaConfig(**dict(FAMILIES["llama"].kwargs, num_labels=3))).eval()
    first = get_prefix_model(base, PrefixConfig(num_virtual_tokens=3))
    with torch.no_grad():
        first.prefixes.entry().weights.get_parameter("score.weight").normal_()
    first.save_pretrained(tmp_path / "ada")
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=3))
    model.load_prefix(tmp_path / "ada", "ada")
    assert not [name for name in model.state_dict() if ".ada." in name]
    assert not [name for name, _ in model.named_parameters() if ".ada." in name]
    text = tokens(2, 5)
    with torch.no_grad():
        expected = first(input_ids=text).logits
        assert torch.equal(model(input_ids=text, prefix_names=["ada", "ada"]).logits, expected)
        assert torch.equal(copy.deepcopy(model)(input_ids=text, prefix_names=["ada", "ada"]).logits, expected)
        model.to(torch.float64)
        assert model.prefixes.entry("ada").weights.get_parameter("score.weight").dtype == torch.float64
        model.to(torch.float32)
    model.save_pretrained(tmp_path / "again", prefix_name="ada")
    first_file, again = ((tmp_path / name / "prefix.safetensors").read_bytes() for name in ("ada", "again"))
    assert first_file[-64:] == again[-64:]

"""Data sets on the Hub, played by data sets in memory that have their columns."""

import sys

import pytest
from paper.data import DataError, Item, load

datasets = pytest.importorskip("datasets")


@pytest.fixture
def hub(monkeypatch):
    """Puts splits on the Hub; what was asked of it is recorded."""
    asked = []

    def fill(**splits):
        data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})

        def load_dataset(name, config=None):
            asked.append((name, config))
            return data

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return fill


MEANING, SOURCE = "name[Aromi], eatType[pub], priceRange[£20-25]", "name : Aromi | Type : pub | price : £ 20 - 25"


@pytest.mark.parametrize(("meaning", "text"), [("meaning_representation", "human_reference"), ("mr", "ref")])
def test_e2e(hub, meaning, text):
    asked = hub(validation=[{meaning: MEANING, text: "One."}, {meaning: MEANING, text: "Two."}])
    assert load("e2e", "tuetschek/e2e_nlg", "dev") == [Item(SOURCE, ("One.", "Two."))]
    assert asked == [("tuetschek/e2e_nlg", None)]


def test_gem_has_one_target_for_training_and_references_for_evaluation(hub):
    hub(
        train=[
            {"meaning_representation": MEANING, "target": "One.", "references": []},
            {"meaning_representation": MEANING, "target": "Two.", "references": []},
        ],
        test=[{"meaning_representation": MEANING, "target": "One.", "references": ["One.", "Two.", "Three."]}],
    )
    assert load("e2e", "GEM/e2e_nlg", "train") == [Item(SOURCE, ("One.", "Two."))]
    assert load("e2e", "GEM/e2e_nlg", "test") == [Item(SOURCE, ("One.", "Two.", "Three."))]


def web_nlg_row(category, triples, texts, file="", by_column=True):
    lex = [{"comment": comment, "lid": "Id1", "text": text, "lang": ""} for comment, text in texts]
    sets = [{"mtriple_set": triples}]
    if by_column:
        lex = {name: [one[name] for one in lex] for name in ("comment", "lid", "text", "lang")}
        sets = {"mtriple_set": [triples]}
    return {"category": category, "modified_triple_sets": sets, "lex": lex, "test_category": file}


@pytest.mark.parametrize("by_column", [True, False])
def test_web_nlg(hub, by_column):
    def row(*args):
        return web_nlg_row(*args, by_column=by_column)

    food = ("Food", ["Bacon | served | hot", "Bacon | country | UK"], [("good", "Hot bacon."), ("toFix", "No.")])
    artist = ("Artist", ["Singer | genre | Jazz"], [("good", "A jazz singer.")])
    asked = hub(
        train=[row(*food)],
        dev=[row(*food)],
        test=[
            row(*food, "testdata_with_lex"),
            row(*artist, "testdata_with_lex"),
            row(*artist, "testdata_unseen_with_lex"),
            # rows without texts
            row("Food", food[1], [("good", "never read")], "testdata_no_lex"),
        ],
    )
    bacon = Item("Bacon : served : hot | Bacon : country : UK", ("Hot bacon.",), "Food")
    assert load("webnlg", "web_nlg", "train") == load("webnlg", "web_nlg", "dev") == [bacon]
    assert load("webnlg", "web_nlg", "test") == [
        bacon,
        Item("Singer : genre : Jazz", ("A jazz singer.",), "Artist", seen=False),
    ]
    assert asked == [("web_nlg", "webnlg_challenge_2017")] * 3


def test_gem_web_nlg(hub):
    train = {"input": ["A_b | c | D"], "target": "One.", "references": [], "category": "Food"}
    test = {
        "input": ["E | f | G", "H | i | J"],
        "target": "Two.",
        "references": ["Two.", "Three."],
        "category": "Artist",
    }
    asked = hub(train=[train], validation=[train], test=[test])
    assert load("webnlg", "GEM/web_nlg", "test") == [
        Item("E : f : G | H : i : J", ("Two.", "Three."), "Artist", seen=False)
    ]
    assert load("webnlg", "gem:web_nlg_en", "train") == [Item("A_b : c : D", ("One.",), "Food")]
    assert asked == [("GEM/web_nlg", "en"), ("gem", "web_nlg_en")]


def test_a_bad_triple_names_its_row(hub):
    good = {"input": ["A | b | C"], "target": "One.", "references": [], "category": "Food"}
    hub(train=[good, {**good, "input": ["A | b"]}])
    with pytest.raises(DataError, match=r"GEM/web_nlg, split train, row 2: \['A', 'b'\] is no triple"):
        load("webnlg", "GEM/web_nlg", "train")


@pytest.mark.parametrize(
    "annotations",
    [
        {"source": ["x", "y"], "text": ["One.", "Two."]},
        [{"source": "x", "text": "One."}, {"source": "y", "text": "Two."}],
    ],
)
def test_dart(hub, annotations):
    hub(validation=[{"tripleset": [["Mars Hill", "JOINED", "1973"], ["A", "B", "C"]], "annotations": annotations}])
    assert load("dart", "dart", "dev") == [Item("Mars Hill : joined : 1973 | A : b : C", ("One.", "Two."))]


def test_gem_dart(hub):
    hub(test=[{"tripleset": [["A", "B", "C"]], "target": "One.", "references": ["One.", "Two."]}])
    assert load("dart", "GEM/dart", "test") == [Item("A : b : C", ("One.", "Two."))]


@pytest.mark.parametrize("summary", ["summary", "target"])
def test_xsum(hub, summary):
    hub(test=[{"document": "Line one.\nLine two.", summary: "Sum.", "id": "7"}])
    assert load("xsum", "EdinburghNLP/xsum", "test") == [Item("Line one. Line two.", ("Sum.",))]


@pytest.mark.parametrize("dataset", ["e2e", "webnlg", "dart", "xsum"])
def test_unknown_columns(hub, dataset):
    hub(train=[{"strange": "x"}])
    with pytest.raises(DataError, match=r"me/data has the columns \['strange'\]; expected .* and .*, or "):
        load(dataset, "me/data", "train")


def test_bbc_is_read_from_a_folder_only(hub):
    hub(train=[{"text": "x"}])
    with pytest.raises(DataError, match="the BBC articles are read from a folder only, which holds bbc"):
        load("bbc", "me/bbc", "train")


def test_a_split_that_is_not_there(hub):
    hub(train=[{"document": "x", "summary": "y"}])
    with pytest.raises(DataError, match=r"has the splits \['train'\], and so nothing to use as dev"):
        load("xsum", "xsum", "dev")


@pytest.mark.parametrize(("name", "folder"), [("me/xsum", None), ("me/xsum:en", "en")])
def test_data_behind_a_script_are_read_from_their_copy_in_parquet(monkeypatch, name, folder):
    row = {"document": "Line one.", "summary": "Sum."}

    def load_dataset(name, config=None, *, data_dir=None, revision=None):
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found xsum.py")
        assert (name, config, data_dir, revision) == ("me/xsum", None, folder, "refs/convert/parquet")
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([row])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("xsum", name, "test") == [Item("Line one.", ("Sum.",))]


def test_neither_folder_nor_on_the_hub(monkeypatch):
    def load_dataset(name, config=None):
        raise FileNotFoundError(f"no {name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"no folder data/e2e, and the Hub did not give .*\(no data/e2e\).*src1_train"):
        load("e2e", "data/e2e", "train")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load("e2e", "e2e_nlg", "train")

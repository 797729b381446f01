"""The paper's data sets, as they lie beside the checkout: counts, linearisation, seen and unseen, grouping."""

import csv
import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from paper.data import DATASETS, PROTOCOLS, Item, check, digest, load, low_data, rows_of, within
from paper.data.counts import PUBLISHED

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}")


@cache
def items_of(dataset, split):
    return load(dataset, str(DATA), split)


def webnlg_entries(split):
    content = json.loads((DATA / "webnlg" / f"{split}.json").read_text(encoding="utf-8"))
    return [entry for numbered in content["entries"] for entry in numbered.values()]


def good_texts(entry):
    return [text["lex"] for text in entry["lexicalisations"] if text["comment"] == "good"]


def without_blanks(item):
    return ["".join(text.split()) for text in item.references]


COMPLETE = [key for key in PUBLISHED if key[0] != "xsum" and key != ("dart", "train")]


@pytest.mark.parametrize(("dataset", "split"), COMPLETE)
def test_as_much_as_was_published(dataset, split):
    assert check(dataset, split, items_of(dataset, split)) is None


def test_the_bbc_splits_add_up_to_all_published_articles():
    assert sum(PUBLISHED["bbc", split].texts for split in ("train", "dev", "test")) == 2225


@pytest.mark.parametrize(("dataset", "split"), [*COMPLETE, *[("xsum", split) for split in ("train", "dev", "test")]])
def test_one_item_for_each_input(dataset, split):
    items = items_of(dataset, split)
    assert dataset == "dart" or len({item.source for item in items}) == len(items)
    assert all(item.references for item in items)


def test_a_part_is_noted():
    note = check("xsum", "test", items_of("xsum", "test"))
    assert note == f"xsum test: expected 11334 texts; found {len(items_of('xsum', 'test'))} texts."


def test_a_missing_reference_is_noted():
    items = list(items_of("webnlg", "test"))
    short = [*items[:-1], Item(items[-1].source, items[-1].references[1:], items[-1].group, items[-1].seen)]
    assert check("webnlg", "test", short) == (
        "webnlg test: expected 4928 texts, 971 seen inputs, 891 unseen inputs; "
        "found 4927 texts, 971 seen inputs, 891 unseen inputs."
    )


def test_samples():
    first = {dataset: items_of(dataset, "test")[0] for dataset in ("e2e", "webnlg", "dart")}
    assert first["e2e"].source == "name : Blue Spice | Type : coffee shop | area : city centre"
    assert first["e2e"].references[:2] == (
        "A coffee shop in the city centre area called Blue Spice .",
        "Blue Spice is a coffee shop in city centre .",
    )
    assert first["webnlg"] == Item(
        "Abilene_Regional_Airport : cityServed : Abilene,_Texas",
        (
            "Abilene, Texas is served by the Abilene regional airport.",
            "Abilene Regional Airport serves the city of Abilene in Texas.",
        ),
        group="Airport",
    )
    assert items_of("webnlg", "test")[500].source == (
        "Madison_County,_Indiana : country : United_States | Alexandria,_Indiana : isPartOf : Madison_County,_Indiana"
        " | Madison_County,_Indiana : largestCity : Anderson,_Indiana"
    )
    assert first["dart"] == Item(
        "Hawaii Five-O : notes : Episode: The Flight of the Jewels | [TABLECONTEXT] : [title] : Jeff Daniels"
        " | [TABLECONTEXT] : title : Hawaii Five-O",
        ("Jeff Daniels played in the Hawaii Five-O episode The Flight of the Jewels",),
    )


def test_articles():
    (article,) = [one for one in items_of("bbc", "train") if one.references[0] == "Ad sales boost Time Warner profit"]
    assert article.group == "business"
    assert "from $639m year-earlier. The firm, which is now" in article.source
    (report,) = [one for one in items_of("xsum", "train") if "Sodje Sports Foundation" in one.source]
    assert "for Nigerian sport. Mr Sodje, 37, is jointly charged" in report.source
    assert report.references == (
        "Former Premier League footballer Sam Sodje has appeared in court alongside three brothers accused of "
        "charity fraud.",
    )


def test_texts_of_an_input_are_grouped_by_first_appearance():
    with (DATA / "e2e" / "testset_w_refs.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    texts = {}
    for row in rows:
        texts.setdefault(row["mr"], []).append("".join(row["ref"].split()))
    assert [without_blanks(item) for item in items_of("e2e", "test")] == list(texts.values())


def test_official_e2e_inputs_become_the_papers(tmp_path):
    (tmp_path / "testset_w_refs.csv").symlink_to(DATA / "e2e" / "testset_w_refs.csv")
    official, paper = load("e2e", str(tmp_path), "test"), items_of("e2e", "test")
    assert [item.source for item in official] == [item.source for item in paper]
    for one, other in zip(official, paper, strict=True):
        assert ["".join(text.split()) for text in one.references] == [
            "".join(text.split()) for text in other.references
        ]
    assert official[0].references[0] == "A coffee shop in the city centre area called Blue Spice."


def test_all_e2e_fields_are_known_to_the_conversion():
    # training has values that the official test lacks: each comes back from the official way of writing it
    from paper.data.e2e import linearised

    official = {"Type": "eatType", "price": "priceRange", "family friendly": "familyFriendly"}
    for split in ("train", "dev", "test"):
        for item in items_of("e2e", split):
            fields = [field.split(" : ") for field in item.source.split(" | ")]
            meaning = ", ".join(f"{official.get(name, name)}[{value}]" for name, value in fields)
            assert linearised(meaning.replace("£ ", "£").replace(" - ", "-")) == item.source


def test_webnlg_seen_and_unseen():
    items = items_of("webnlg", "test")
    groups = Counter((item.group, item.seen) for item in items)
    assert {group for group, seen in groups if not seen} == {
        *("Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician")
    }
    assert sum(count for (_, seen), count in groups.items() if seen) == 971
    assert sum(count for (_, seen), count in groups.items() if not seen) == 891
    assert all(item.seen for split in ("train", "dev") for item in items_of("webnlg", split))


def test_webnlg_test_has_an_item_for_each_entry():
    entries = webnlg_entries("test")
    assert [list(item.references) for item in items_of("webnlg", "test")] == [good_texts(entry) for entry in entries]
    assert [item.group for item in items_of("webnlg", "test")] == [entry["category"] for entry in entries]


def test_webnlg_input_of_two_categories_is_one_item():
    source = "Abilene,_Texas : country : United_States"
    (item,) = [item for item in items_of("webnlg", "train") if item.source == source]
    triple = {"subject": "Abilene,_Texas", "property": "country", "object": "United_States"}
    entries = [entry for entry in webnlg_entries("train") if entry["modifiedtripleset"] == [triple]]
    assert [entry["category"] for entry in entries] == ["Airport", "City"]
    assert list(item.references) == good_texts(entries[0]) + good_texts(entries[1])
    assert item.group == "Airport"


def test_dart_entries_are_scored_one_by_one():
    entries = json.loads((DATA / "dart" / "test.json").read_text(encoding="utf-8"))
    texts = [[text["text"].strip() for text in entry["annotations"]] for entry in entries]
    items = items_of("dart", "test")
    assert [list(item.references) for item in items] == texts
    assert len({(item.source, item.references) for item in items}) == len(items) - 891  # exact copies


@pytest.mark.parametrize("dataset", ["xsum", "bbc"])
def test_own_splits_share_no_article_and_lose_none(dataset):
    splits = [{item.source for item in items_of(dataset, split)} for split in ("train", "dev", "test")]
    together = set.union(*splits)
    assert len(together) == sum(map(len, splits)) == {"xsum": 4285, "bbc": 2089}[dataset]
    assert 0.78 < len(splits[0]) / len(together) < 0.82


def test_bbc_protocols():
    splits = [items_of("bbc", split) for split in ("train", "dev", "test")]
    train, dev, test = within("news-to-sport", *splits)
    assert {item.group for item in (*train, *dev)} == {"business", "entertainment", "politics", "tech"}
    assert {item.group for item in test} == {"sport"}
    assert len(train) == sum(item.group != "sport" for item in splits[0])
    train, dev, test = within("within-news", *splits)
    assert {item.group for item in (*train, *dev)} == {"business", "politics"}
    assert {item.group for item in test} == {"tech", "entertainment"}
    assert set(PROTOCOLS) == {"news-to-sport", "within-news"}


@pytest.mark.parametrize(("size", "measured"), [(50, 15), (100, 30), (200, 60), (500, 150)])
def test_low_data_of_e2e(size, measured):
    train, dev = items_of("e2e", "train"), items_of("e2e", "dev")
    small, small_dev = low_data(train, dev, size, 0)
    assert (len(rows_of(small, "\n", "")), len(rows_of(small_dev, "\n", ""))) == (size, measured)
    texts = {item.source: item.references for item in (*train, *dev)}
    assert all(item.references[0] in texts[item.source] for item in (*small, *small_dev))
    assert not {item.source for item in small} & {item.source for item in small_dev}


def test_the_parent_folder_and_the_folder_are_the_same_data():
    assert digest(load("e2e", str(DATA / "e2e"), "test")) == digest(items_of("e2e", "test"))


def test_every_data_set_is_here():
    assert set(DATASETS) == {"e2e", "webnlg", "dart", "xsum", "bbc"}

"""Small training sets, groups, rows, digests and counts, on made-up items."""

from dataclasses import replace

import pytest
from paper.data import DataError, Item, check, digest, low_data, of_groups, rows_of, within
from paper.data.item import merged, with_texts

TRAIN = [Item(f"input {i}", tuple(f"text {i}.{j}" for j in range(i % 3 + 1)), group="ab"[i % 2]) for i in range(60)]
DEV = [replace(item, source=f"dev {item.source}") for item in TRAIN]


def keys(items):
    return [(item.source, item.references) for item in items]


def test_low_data_draws_pairs_without_replacement():
    train, dev = low_data(TRAIN, DEV, 40, 0)
    assert (len(train), len(dev)) == (40, 12)
    assert all(len(item.references) == 1 for item in (*train, *dev))
    pairs = {(item.source, (text,)) for item in TRAIN for text in item.references}
    assert len(set(keys(train))) == 40
    assert set(keys(train)) <= pairs
    assert all(item.source.startswith("dev ") for item in dev)
    everything, _ = low_data(TRAIN, DEV, len(pairs), 0)
    assert set(keys(everything)) == pairs


def test_low_data_keeps_the_group():
    groups = {item.source: item.group for item in TRAIN}
    assert all(item.group == groups[item.source] for item in low_data(TRAIN, DEV, 40, 0)[0])


def test_low_data_is_the_same_on_every_machine():
    train, dev = low_data(TRAIN, DEV, 4, 1)
    assert keys(train) == keys(low_data(TRAIN, DEV, 4, 1)[0])
    assert [item.references[0] for item in (*train, *dev)] == [
        "text 49.1",
        "text 19.1",
        "text 59.1",
        "text 51.0",
        "text 47.1",
    ]


def test_low_data_differs_by_subset_and_size():
    first, second, larger = (set(keys(low_data(TRAIN, DEV, *which)[0])) for which in ((20, 0), (20, 1), (40, 0)))
    assert first != second
    assert not first <= larger


def test_low_data_of_too_much():
    with pytest.raises(DataError, match="Cannot draw 121 of 120 pairs"):
        low_data(TRAIN, DEV, 121, 0)
    with pytest.raises(DataError, match="Cannot draw 0 of"):
        low_data(TRAIN, DEV, 0, 0)


def test_low_data_measures_on_all_there_are():
    _, dev = low_data(TRAIN, DEV[1:2], 50, 3)
    assert sorted(item.references for item in dev) == sorted((text,) for text in DEV[1].references)


def test_groups():
    assert [item.source for item in of_groups(TRAIN, ["b"])] == [f"input {i}" for i in range(1, 60, 2)]
    assert of_groups(TRAIN, ["b", "a"]) == TRAIN
    with pytest.raises(DataError, match="No items of c; the data have the groups a, b"):
        of_groups(TRAIN, ["a", "c"])


def test_unknown_protocol():
    with pytest.raises(DataError, match="Unknown protocol 'sport'; known are news-to-sport, within-news"):
        within("sport", TRAIN, DEV, TRAIN)


def test_rows():
    items = [Item("a", ("one", "two")), Item("b", ("three",))]
    assert rows_of(items, " =>", " ") == [
        {"prompt": "a =>", "target": " one"},
        {"prompt": "a =>", "target": " two"},
        {"prompt": "b =>", "target": " three"},
    ]


def test_merging():
    items = [
        Item(" a ", (" one",), "X", seen=False),
        Item("b", (), "X"),
        Item("c", ("two",), "Y"),
        Item("a", ("one", "three "), "Y", seen=True),
    ]
    assert [item.source for item in with_texts(items)] == ["a", "c", "a"]
    assert merged(with_texts(items)) == [Item("a", ("one", "one", "three"), "X", seen=True), Item("c", ("two",), "Y")]


def test_digest_tells_any_change():
    items = [Item("a", ("one", "two")), Item("b", ("three",), "X", seen=False)]
    others = [
        items[::-1],
        items[:1],
        [items[0], replace(items[1], seen=True)],
        [items[0], replace(items[1], group="Y")],
        [Item("a", ("two", "one")), items[1]],
        [Item("a", ("one",)), Item("two", ("",)), items[1]],
        [Item("ä", ("one", "two")), items[1]],
    ]
    digests = {digest(one) for one in [items, *others]}
    assert len(digests) == 1 + len(others)
    assert digest(items) == digest(list(items))
    assert all(len(one) == 64 for one in digests)


def test_counts_of_inputs():
    items = [Item(f"{i}", ("x",) * (7 if i else 4693 - 7 * 629)) for i in range(630)]
    assert check("e2e", "test", items) is None
    split = [*items[:-1], Item("p", ("x",)), Item("q", ("x",) * 6)]
    assert check("e2e", "test", split) == ("e2e test: expected 4693 texts, 630 inputs; found 4693 texts, 631 inputs.")

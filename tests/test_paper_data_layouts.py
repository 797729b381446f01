"""Official layouts of E2E, WebNLG and DART are read like the paper's; broken files, too, which the tests write."""

import json
from xml.sax.saxutils import escape, quoteattr

import pytest
from paper.data import DataError, Item, load
from paper.data.e2e import linearised


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


# E2E ------------------------------------------------------------------------------------------------------------------

E2E_MEANINGS = [
    (
        "name[The Mill], eatType[pub], food[English], priceRange[£20-25], customer rating[3 out of 5], "
        "area[city centre], familyFriendly[no], near[Café Rouge]"
    ),
    "name[Aromi], priceRange[less than £20]",
]
E2E_SOURCES = [
    (
        "name : The Mill | Type : pub | food : English | price : £ 20 - 25 | customer rating : 3 out of 5 | "
        "area : city centre | family friendly : no | near : Café Rouge"
    ),
    "name : Aromi | price : less than £ 20",
]


@pytest.mark.parametrize("which", [0, 1])
def test_e2e_linearisation(which):
    assert linearised(E2E_MEANINGS[which]) == E2E_SOURCES[which]


@pytest.mark.parametrize(
    ("split", "paper", "official"),
    [
        ("train", "src1_train.txt", "trainset.csv"),
        ("dev", "src1_valid.txt", "devset.csv"),
        ("test", "src1_test.txt", "testset_w_refs.csv"),
    ],
)
def test_e2e_layouts_are_equal(tmp_path, split, paper, official):
    order, texts = [0, 1, 0], ["An English pub .", 'Aromi is "cheap" , said one\u2028visitor .', "The Mill"]
    write(tmp_path / "a" / paper, "".join(f"{E2E_SOURCES[i]}||{t} \n" for i, t in zip(order, texts, strict=True)))
    rows = [(E2E_MEANINGS[i], t.replace('"', '""')) for i, t in zip(order, texts, strict=True)]
    write(tmp_path / "b" / official, "\ufeffmr,ref\r\n" + "".join(f'"{mr}","{text}"\r\n' for mr, text in rows))
    expected = [Item(E2E_SOURCES[0], (texts[0], texts[2])), Item(E2E_SOURCES[1], (texts[1],))]
    assert load("e2e", str(tmp_path / "a"), split) == load("e2e", str(tmp_path / "b"), split) == expected


@pytest.mark.parametrize("meaning", ["name Aromi", "name[Aromi", "name[Aromi] area[riverside]", "name[Aromi],", ""])
def test_e2e_meaning_that_is_none(tmp_path, meaning):
    write(tmp_path / "devset.csv", f'mr,ref\n"name[Zizzi]",fine\n"{meaning}",text\n')
    with pytest.raises(DataError, match=r"devset\.csv, line 3: .* is no list of fields"):
        load("e2e", str(tmp_path), "dev")


def test_e2e_broken_files(tmp_path):
    write(tmp_path / "src1_test.txt", "name : A||fine\n\nname : B|text\n")
    with pytest.raises(DataError, match=r"src1_test\.txt, line 3: expected an input, \|\|, and a text"):
        load("e2e", str(tmp_path), "test")
    write(tmp_path / "devset.csv", "meaning,ref\nname[A],fine\n")
    with pytest.raises(DataError, match=r"devset\.csv, line 2: expected the columns mr and ref"):
        load("e2e", str(tmp_path), "dev")
    write(tmp_path / "trainset.csv", "mr,ref\nname[A], with a comma,fine\n")
    with pytest.raises(DataError, match=r"trainset\.csv, line 2: expected the columns mr and ref"):
        load("e2e", str(tmp_path), "train")


# WebNLG ---------------------------------------------------------------------------------------------------------------

WEBNLG = {
    "train": [
        (
            "Airport",
            ['Adolfo_S._Airport | location | "Madrid & Alcobendas"'],
            [("good", "In <Madrid>."), ("toFix", "X")],
        ),
        ("Airport", ["A | b | C", "C | d_e | 1.0"], [("good", "First."), ("good", "Second.")]),
        ("Food", ["A | b | C"], [("toFix", "Nothing good.")]),
    ],
    "dev": [("Food", ["Bacon | country | UK"], [("good", "Bacon is British.")])],
    "test": [
        ("Food", ["Bacon | served | hot"], [("good", "Hot bacon."), ("good", "Hot bacon.")]),
        ("Artist", ["Singer | genre | Jazz"], [("good", "A jazz singer.")]),
    ],
}
WEBNLG_ITEMS = {
    "train": [
        Item('Adolfo_S._Airport : location : "Madrid & Alcobendas"', ("In <Madrid>.",), "Airport"),
        Item("A : b : C | C : d_e : 1.0", ("First.", "Second."), "Airport"),
    ],
    "dev": [Item("Bacon : country : UK", ("Bacon is British.",), "Food")],
    "test": [
        Item("Bacon : served : hot", ("Hot bacon.", "Hot bacon."), "Food"),
        Item("Singer : genre : Jazz", ("A jazz singer.",), "Artist", seen=False),
    ],
}


def webnlg_xml(entries):
    lines = ["<?xml version='1.0' encoding='UTF-8'?>", "<benchmark><entries>"]
    for number, (category, triples, texts) in enumerate(entries, start=1):
        lines.append(f"<entry category={quoteattr(category)} eid='Id{number}' size='{len(triples)}'>")
        lines.append("<originaltripleset><otriple>not | this | one</otriple></originaltripleset><modifiedtripleset>")
        lines += [f"<mtriple>{escape(triple)}</mtriple>" for triple in triples]
        lines.append("</modifiedtripleset>")
        lines += [f"<lex comment='{comment}' lid='Id1'>\n{escape(text)}\n</lex>" for comment, text in texts]
        lines.append("</entry>")
    return "\n".join([*lines, "</entries></benchmark>"])


def webnlg_json(entries):
    def triple(text):
        return dict(zip(("subject", "property", "object"), text.split(" | "), strict=True))

    return {
        "entries": [
            {
                str(number): {
                    "category": category,
                    "modifiedtripleset": [triple(one) for one in triples],
                    "lexicalisations": [{"comment": comment, "lex": text} for comment, text in texts],
                }
            }
            for number, (category, triples, texts) in enumerate(entries, start=1)
        ]
    }


@pytest.fixture
def webnlg_folder(tmp_path):
    """The official folders; the same folder holds no JSON."""
    train = WEBNLG["train"]
    write(tmp_path / "train" / "1triples" / "1triple_Airport.xml", webnlg_xml(train[:1]))
    write(tmp_path / "train" / "1triples" / "1triple_Food.xml", webnlg_xml(train[2:]))
    write(tmp_path / "train" / "2triples" / "2triples_Airport.xml", webnlg_xml(train[1:2]))
    write(tmp_path / "dev" / "1triples" / "1triple_Food.xml", webnlg_xml(WEBNLG["dev"]))
    write(tmp_path / "test" / "testdata_with_lex.xml", webnlg_xml(WEBNLG["test"]))
    write(tmp_path / "test" / "testdata_unseen_with_lex.xml", webnlg_xml(WEBNLG["test"][1:]))
    write(tmp_path / "test" / "testdata_no_lex.xml", webnlg_xml([(*one[:2], []) for one in WEBNLG["test"]]))
    return tmp_path


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_webnlg_layouts_are_equal(webnlg_folder, split):
    assert load("webnlg", str(webnlg_folder), split) == WEBNLG_ITEMS[split]
    for name, entries in WEBNLG.items():
        write(webnlg_folder / "json" / "webnlg" / f"{name}.json", json.dumps(webnlg_json(entries)))
    assert load("webnlg", str(webnlg_folder / "json"), split) == WEBNLG_ITEMS[split]


def test_webnlg_needs_training_to_tell_what_is_seen(webnlg_folder):
    write(webnlg_folder / "alone" / "test.json", json.dumps(webnlg_json(WEBNLG["test"])))
    with pytest.raises(DataError, match=r"has no train\.json or train/\*/\*\.xml.*which categories are seen"):
        load("webnlg", str(webnlg_folder / "alone"), "test")


def test_webnlg_broken_files(webnlg_folder):
    file = write(webnlg_folder / "test" / "testdata_with_lex.xml", "<benchmark>\n<entries>\n</benchmark>")
    with pytest.raises(DataError, match=r"testdata_with_lex\.xml, line 3: not XML"):
        load("webnlg", str(webnlg_folder), "test")
    write(file, webnlg_xml([WEBNLG["test"][0], ("Food", ["Bacon | hot"], [("good", "Hot.")])]))
    with pytest.raises(DataError, match=r"testdata_with_lex\.xml, entry Id2: \['Bacon', 'hot'\] is no triple"):
        load("webnlg", str(webnlg_folder), "test")
    file = write(webnlg_folder / "dev.json", '{"entries":\n[}')
    with pytest.raises(DataError, match=r"dev\.json, line 2: not JSON"):
        load("webnlg", str(webnlg_folder), "dev")
    write(file, '{"entries": [{"1": {"category": "Food"}}]}')
    with pytest.raises(DataError, match=r"dev\.json, entry 1: expected category, modifiedtripleset and"):
        load("webnlg", str(webnlg_folder), "dev")
    write(file, "[]")
    with pytest.raises(DataError, match=r"dev\.json: expected \{.entries"):
        load("webnlg", str(webnlg_folder), "dev")


# DART -----------------------------------------------------------------------------------------------------------------

DART = [
    {"tripleset": [["First Clearing", "LOCATION", "NYS 52"]], "annotations": [{"source": "x", "text": " On it "}]},
    {"tripleset": [["A", "B_C", "D"], ["[TABLECONTEXT]", "[TITLE]", "E"]], "annotations": []},
    {"tripleset": [["First Clearing", "Location", "NYS 52"]], "annotations": [{"text": "There"}, {"text": ""}]},
]
DART_ITEMS = [
    Item("First Clearing : location : NYS 52", ("On it",)),
    Item("First Clearing : location : NYS 52", ("There", "")),
]


@pytest.mark.parametrize("name", ["dart-v1.1.1-full-train.json", "train.json"])
def test_dart_layouts_are_equal(tmp_path, name):
    write(tmp_path / name, json.dumps(DART))
    assert load("dart", str(tmp_path), "train") == DART_ITEMS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"tripleset": [["a", "b", "c"]]}]',
            r"dev\.json, entry 1: expected an object with tripleset and",
        ),
        ('[{"tripleset": [["a", "b"]], "annotations": []}]', r"dev\.json, entry 1: \['a', 'b'\] is no triple"),
        ('[{"tripleset": [["a", null, "b"]], "annotations": []}]', r"dev\.json, entry 1: "),
        ('[{"tripleset": [["a", "b", 3]], "annotations": []}]', r"dev\.json, entry 1: "),
        ("{}", r"dev\.json: expected a list"),
        ("[\n\n,]", r"dev\.json, line 3: not JSON"),
    ],
)
def test_dart_broken_files(tmp_path, content, message):
    write(tmp_path / "dev.json", content)
    with pytest.raises(DataError, match=message):
        load("dart", str(tmp_path), "dev")

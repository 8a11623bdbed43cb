"""Topic files become rows: every part of an entry, and every mistake with its file and entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeforge.data.topics.build import build, scaffold_topics
from mergeforge.data.topics.topic_file import normalize_text, parse_difficulty
from mergeforge.errors import OutputError, RecipeError

STRUCTURE: dict[str, Any] = {
    "placeholders": {"NAME": "Aria", "MAKER": "Example Ltd"},
    "categories": {
        "identity": {
            "description": "Who it is.",
            "tags": ["self"],
            "content_types": ["qa"],
            "subcategories": {"name": {"tags": ["name"]}, "origin": {"content_types": ["qa", "story"]}},
        }
    },
}
ENTRY = {"question": "Who are you?", "output": "I am ${NAME}."}


def write(root: Path, topics: dict[str, Any], **changes: Any) -> Path:
    (root / "topics").mkdir(exist_ok=True)
    for name, entries in topics.items():
        (root / "topics" / f"{name}.json").write_text(json.dumps(entries))
    (root / "structure.yaml").write_text(yaml.safe_dump({**STRUCTURE, **changes}))
    return root / "structure.yaml"


def with_name_entries(root: Path, *entries: Any, **changes: Any) -> Path:
    return write(
        root, {"identity.name.qa": list(entries), "identity.origin.qa": [], "identity.origin.story": []}, **changes
    )


def rows(root: Path, *entries: Any, **changes: Any) -> list[Any]:
    build(with_name_entries(root, *entries, **changes), root / "out.jsonl")
    return [json.loads(line) for line in (root / "out.jsonl").read_text().splitlines()]


def test_a_row_by_hand(tmp_path: Path) -> None:
    entry = {**ENTRY, "difficulty": "3/6", "tags": ["short", "self"]}
    assert rows(tmp_path, entry, system="You are ${NAME} of ${MAKER}.") == [
        {
            "messages": [
                {"role": "system", "content": "You are Aria of Example Ltd."},
                {"role": "user", "content": "Who are you?"},
                {"role": "assistant", "content": "I am Aria."},
            ],
            "id": "identity.name.qa:1",
            "category": "identity",
            "subcategory": "name",
            "type": "qa",
            "tags": ["self", "name", "short"],
            "difficulty": 3,
        }
    ]


def test_spelling_of_reasoning_and_output(tmp_path: Path) -> None:
    entries = [{**ENTRY, "think": "My name."}, ENTRY]
    answers = [row["messages"][-1]["content"] for row in rows(tmp_path, *entries)]
    assert answers == ["<think>\nMy name.\n</think>\n\nI am Aria.", "I am Aria."]
    spelling = {"think": "<think>{}</think>", "output": "<output>{}</output>"}
    answers = [row["messages"][-1]["content"] for row in rows(tmp_path, *entries, spelling=spelling)]
    assert answers == ["<think>My name.</think><output>I am Aria.</output>", "<output>I am Aria.</output>"]


def test_text_is_normalized(tmp_path: Path) -> None:
    assert normalize_text("\r\n  a  \r\n    b\t\r\n\r\n") == "a\n  b"
    assert normalize_text("def f():\n    return 1") == "def f():\n    return 1"
    built_rows = rows(tmp_path, {"question": ["one", "two"], "output": "  x\n  y\n"})
    assert [message["content"] for message in built_rows[0]["messages"]] == ["one\ntwo", "x\ny"]


def test_literal_line_breaks_in_text(tmp_path: Path) -> None:
    path = with_name_entries(tmp_path)
    (tmp_path / "topics" / "identity.name.qa.json").write_text('[{"question": "a\nb", "output": "c\n\td"}]')
    build(path, tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["messages"][1]["content"] == "c\n\td"


def test_placeholders_and_lookalikes(tmp_path: Path) -> None:
    built_rows = rows(tmp_path, {"question": "${NAME}/${MAKER}?", "output": "$${NAME} $NAME {NAME} $5"})
    assert [message["content"] for message in built_rows[0]["messages"]] == [
        "Aria/Example Ltd?",
        "${NAME} $NAME {NAME} $5",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1), (6, 6), ("4", 4), ("2/6", 2), (3.0, 3), ("easy", 2), ("Very-Hard", 5), ("EXPERT", 6), ("moderate", 3)],
)
def test_difficulties(value: Any, expected: int) -> None:
    assert parse_difficulty(value) == expected


@pytest.mark.parametrize("value", [0, 7, "7/6", "2/10", 2.5, True, "", "so so", -1, [3]])
def test_invalid_difficulties(value: Any) -> None:
    assert parse_difficulty(value) is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**ENTRY, "difficulty": 9}, "identity.name.qa.json, entry 2: unknown difficulty 9"),
        ({**ENTRY, "ouptut": "x"}, "entry 2: unknown key 'ouptut' (did you mean 'output'?)"),
        ({"question": "x"}, "entry 2: output is missing"),
        ({**ENTRY, "question": " \n"}, "entry 2: question is empty"),
        ({**ENTRY, "output": 3}, "entry 2: output must be text or a list of lines"),
        ({**ENTRY, "think": "${NAEM}"}, "entry 2, think: unknown placeholder ${NAEM} (did you mean 'NAME'?)"),
        ({**ENTRY, "tags": [1]}, "entry 2: tags must be a list of words"),
        ("text", "entry 2 is not an object"),
    ],
)
def test_mistakes_in_entries_name_the_file_and_entry(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        build(with_name_entries(tmp_path, ENTRY, entry), tmp_path / "out.jsonl")
    assert message in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_reports_all_mistakes_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        build(with_name_entries(tmp_path, {"question": "${X}"}, {"output": "${Y}"}), tmp_path / "out.jsonl")
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placeholder": {}}, "column 1: unknown key 'placeholder' (did you mean 'placeholders'?)"),
        ({"spelling": {"think": "<think>"}}, "'think' must contain {} exactly once"),
        ({"placeholders": {"MY NAME": "x"}}, "'MY NAME' is not a valid placeholder name"),
        ({"categories": {}}, "there are no categories"),
        ({"categories": {"a": {"subcategories": {"b": {}}}}}, "neither 'b' nor its category has content_types"),
        ({"categories": {"a.b": {"content_types": ["qa"], "subcategories": {"c": {}}}}}, "'a.b' cannot be part of"),
        ({"categories": {"a": {}}}, "needs the key 'subcategories'"),
    ],
)
def test_mistakes_in_the_structure(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        build(with_name_entries(tmp_path, ENTRY, **changes), tmp_path / "out.jsonl")
    assert message in str(error.value)


def test_missing_and_unexpected_topic_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        build(write(tmp_path, {"identity.nmae.qa": []}), tmp_path / "out.jsonl")
    assert "lacks identity.name.qa.json" in str(error.value)
    assert "identity.nmae.qa.json is not part of the structure" in str(error.value)
    assert "did you mean 'identity.name.qa.json'?" in str(error.value)


def test_scaffold_creates_only_missing_files(tmp_path: Path) -> None:
    path = write(tmp_path, {"identity.name.qa": [ENTRY]})
    built = build(path, tmp_path / "out.jsonl", scaffold=True)
    assert built.scaffolded == ("identity.origin.qa.json", "identity.origin.story.json") == built.empty
    assert (built.rows, built.topics, built.categories) == (1, 1, {"identity": 1})
    made = json.loads((tmp_path / "topics" / "identity.origin.qa.json").read_text())
    assert made == {"description": "Who it is.", "entries": []}
    again = build(path, tmp_path / "out.jsonl")
    assert (again.rows, again.scaffolded) == (1, ())


def test_structure_in_json_builds_the_same(tmp_path: Path) -> None:
    expected = rows(tmp_path, ENTRY)
    (tmp_path / "structure.json").write_text(json.dumps(STRUCTURE))
    build(tmp_path / "structure.json", tmp_path / "other.jsonl")
    assert [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()] == expected


def test_refuses_to_overwrite_an_input(tmp_path: Path) -> None:
    path = with_name_entries(tmp_path, ENTRY)
    for out in (path, tmp_path / "topics" / "identity.name.qa.json"):
        with pytest.raises(OutputError, match="is an input"):
            build(path, out)


def test_no_entries_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="hold no entries"):
        build(with_name_entries(tmp_path), tmp_path / "out.jsonl")


@pytest.mark.parametrize("inside", [False, True])
def test_folders_by_category_and_subcategory(tmp_path: Path, inside: bool) -> None:
    """The same entries in topics/identity/name/ give the same rows, with the structure file beside topics or in it."""
    expected = rows(tmp_path, ENTRY)
    root = tmp_path / "tree"
    folder = root / "topics"
    folder.mkdir(parents=True)
    structure = (folder if inside else root) / "structure.json"
    structure.write_text(json.dumps(STRUCTURE | {"layout": "hierarchical"}))
    created = scaffold_topics(structure)
    names = [path.relative_to(folder).as_posix() for path in created]
    assert names == [
        "identity/name/identity.name.qa.json",
        "identity/origin/identity.origin.qa.json",
        "identity/origin/identity.origin.story.json",
    ]
    assert scaffold_topics(structure) == ()
    created[0].write_text(json.dumps([ENTRY]))
    structure.write_text(json.dumps(STRUCTURE))  # the folders are found without `layout`
    build(structure, tmp_path / "tree.jsonl")
    assert [json.loads(line) for line in (tmp_path / "tree.jsonl").read_text().splitlines()] == expected


def test_a_file_in_the_wrong_folder_is_reported_with_its_place(tmp_path: Path) -> None:
    path = with_name_entries(tmp_path, ENTRY, layout="hierarchical")
    with pytest.raises(RecipeError) as error:
        build(path, tmp_path / "out.jsonl")
    assert "it belongs at" in str(error.value) and "identity/name/identity.name.qa.json" in str(error.value)

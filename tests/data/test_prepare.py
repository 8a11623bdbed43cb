"""Token stores on disk: counts by hand, cutting, splitting, reuse, memory, and data with nothing to train on."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.byte_chats import REASONING, chat, chatml, ids, trained, with_tokens, write_rows

from mergeforge.data import DataSettings, DataSource, Prepared, TokenStore, data_settings, prepare
from mergeforge.data.render import make_renderer
from mergeforge.data.stats import character_stats, first_prompts
from mergeforge.errors import MergeforgeError, RecipeError, SourceError

ROWS = [{"prompt": f"q{at}", "response": "a" * at} for at in range(1, 21)]
OVERHEAD = len(ids("User: q1\nAssistant: ")) + 1  # and EOS


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def prepare_files(tmp_path: Path, tokenizer: Any, *paths: Any, **keys: Any) -> Prepared:
    settings = data_settings(
        {"data": [{"path": str(path)} for path in paths], **keys}, seq_len=keys.pop("seq_len", None)
    )
    return prepare(settings, tokenizer, tmp_path / "store")


def rows_in(store: TokenStore, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(store[at].tokens) for at in range(len(store))]


def test_counts_by_hand(tmp_path: Path, tokenizer: Any) -> None:
    bad = ["{no", {"prompt": "x", "response": ""}, {"prompt": "x", "response": [1]}, ROWS[0], ROWS[0]]
    stats = prepare_files(
        tmp_path, tokenizer, write_rows(tmp_path / "a.jsonl", [*ROWS, *bad]), seq_len=OVERHEAD + 18
    ).counts
    two_digits = 1  # rows from q10 on ask with a character more
    lengths = [OVERHEAD + at + two_digits * (at > 9) for at in range(1, 21)]
    lengths = sorted([one for one in lengths if one <= OVERHEAD + 18] + [OVERHEAD + 1] * 2)
    assert (stats.rows, stats.used, stats.empty, stats.bad, stats.too_long) == (25, 19, 1, 2, 3)
    assert (stats.duplicates, stats.cut, stats.examples) == (2, 0, 19)
    assert stats.tokens == sum(lengths)
    assert stats.trained == sum(range(1, 18)) + 2 + 2 * 19, "the answer, the space before it and EOS"
    assert (stats.p50, stats.p95, stats.p99, stats.longest) == (lengths[9], lengths[18], lengths[18], lengths[18])
    assert sum(count for _, count in stats.histogram) == 19
    places = {one.place.rpartition(":")[2]: (one.kind, one.why) for one in stats.skipped}
    assert places["21"] == ("bad", "not JSON: Expecting property name enclosed in double quotes at column 2")
    assert places["22"] == ("empty", "an empty answer")
    assert places["23"] == ("bad", "'response' must be text, not a list")
    assert places["18"] == ("too_long", f"more than {OVERHEAD + 18} tokens")


def test_histogram_steps_are_round(tmp_path: Path, tokenizer: Any) -> None:
    prepared = prepare_files(
        tmp_path, tokenizer, write_rows(tmp_path / "a.jsonl", [{"text": "b" * 99}, {"text": "b" * 119}])
    )
    assert (prepared.counts.longest, prepared.counts.tokens) == (120, 220)
    assert prepared.counts.histogram == (*((upto, 0) for upto in range(10, 100, 10)), (100, 1), (110, 0), (120, 1))


def test_counts_by_source_and_in_total(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    counts = prepare_files(tmp_path, tokenizer, data, "sample:translate", data).counts
    assert [one.rows for one in counts.sources.values()] == [20, 20, 20]
    assert [one.duplicates for one in counts.sources.values()] == [0, 0, 0]
    assert (counts.rows, counts.duplicates) == (60, 20)
    assert counts.tokens == sum(one.tokens for one in counts.sources.values())


def test_decisions_by_source_and_format(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "other.jsonl", [{"text": "plain", "id": 1}])
    prepared = prepare_files(tmp_path, tokenizer, tmp_path / "*.jsonl")
    assert [(one.format, one.unused) for one in prepared.decisions] == [("text", ("id",)), ("prompt_response", ())]
    assert prepared.decisions[1].columns == {"prompt": "prompt", "response": "response"}


def test_split_is_exact_and_by_content(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*ROWS, *ROWS[:10]]
    prepared = prepare_files(tmp_path, tokenizer, write_rows(tmp_path / "a.jsonl", rows), val=0.2)
    assert prepared.validation is not None
    train, held = rows_in(prepared.train, tokenizer), rows_in(prepared.validation, tokenizer)
    assert len(set(held)) == 4, "a fifth of twenty different rows"
    assert not set(train) & set(held)
    assert len(train) + len(held) == 30
    turned = prepare_files(tmp_path, tokenizer, write_rows(tmp_path / "b.jsonl", rows[::-1]), val=0.2)
    assert turned.validation is not None
    assert sorted(rows_in(turned.validation, tokenizer)) == sorted(held)
    settings = DataSettings((DataSource(str(tmp_path / "a.jsonl")),), validation=0.2, seed=1)
    other = prepare(settings, tokenizer, tmp_path / "store").validation
    assert other is not None and sorted(rows_in(other, tokenizer)) != sorted(held)


def test_val_as_a_number_of_rows_or_other_data(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    prepared = prepare_files(tmp_path, tokenizer, data, val=3)
    assert prepared.validation is not None and (len(prepared.train), len(prepared.validation)) == (17, 3)
    other = write_rows(tmp_path / "held.jsonl", [ROWS[4], {"prompt": "new", "response": "one"}])
    prepared = prepare_files(tmp_path, tokenizer, data, val=str(other))
    assert prepared.validation is not None and (len(prepared.train), len(prepared.validation)) == (19, 2)
    assert prepared.notes == ("1 examples are also in the validation data; they are not trained on",)
    assert prepared.counts.rows == 20
    assert prepared.counts.sources[f"validation: {other}"].rows == 2


@pytest.mark.parametrize(("wanted", "message"), [(20, "20 of 20 distinct rows"), (0.99, "0.99 of 20 distinct rows")])
def test_refuses_a_split_that_leaves_nothing(
    tmp_path: Path, data: Path, tokenizer: Any, wanted: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        prepare_files(tmp_path, tokenizer, data, val=wanted)


def test_long_rows_are_dropped_or_cut(tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "0123456789", "response": "answer"}
    whole = ids("User: 0123456789\nAssistant: answer")
    path = write_rows(tmp_path / "a.jsonl", [row, {"prompt": "q", "response": "a"}])
    end = ids(" answer")

    def first(too_long: str, seq_len: int) -> Any:
        renderer = make_renderer(data_settings({"data": [], "too_long": too_long}, seq_len=seq_len), tokenizer)
        return renderer.render(next(iter(_contents(path))))

    assert first("drop", 20).too_long == 1
    left = first("cut_prompt", 12).examples[0]
    assert left.tokens.tolist() == [*whole, 257][-12:]
    assert trained(left) == [*end, 257]
    assert first("cut_prompt", len(end) + 2).examples[0].tokens.tolist() == [*ids(":"), *end, 257]
    assert first("cut_prompt", len(end) + 1).too_long == 1, "only the answer would fit"
    right = first("cut_end", len(whole) - 3).examples[0]
    assert right.tokens.tolist() == whole[:-3]
    assert trained(right) == end[:-3]
    assert first("cut_end", len(whole) - len(end)).too_long == 1, "nothing of the answer is left"


def _contents(path: Path) -> Any:
    from mergeforge.data.counts import RecordCounter
    from mergeforge.data.source_reader import open_files, parse_file

    for file in open_files(DataSource(str(path))):
        yield from (row.content for row in parse_file(file, RecordCounter()))


def test_cut_prompt_keeps_bos_and_trains_on_no_partial_answer(folder: Path) -> None:
    from mergeforge.data.conversation import parse_conversation

    tokenizer = with_tokens(folder, bos=True)
    row = parse_conversation(chat("0123", "first answer", "4567", "second"))
    whole = make_renderer(data_settings({"data": []}), tokenizer).render(row).examples[0].tokens.tolist()
    cutting = make_renderer(data_settings({"data": [], "too_long": "cut_prompt"}, seq_len=36), tokenizer)
    example = cutting.render(row).examples[0]
    assert example.tokens.tolist() == [256, *whole[-35:]]
    assert "wer" in tokenizer.decode(example.tokens), "part of the first answer remains"
    assert trained(example) == [*ids(" second"), 257]


def test_long_texts_are_cut_into_chunks(tmp_path: Path, folder: Path) -> None:
    tokenizer = with_tokens(folder, bos=True)
    path = write_rows(tmp_path / "a.jsonl", [{"text": "0123456789"}])
    prepared = prepare_files(tmp_path, tokenizer, path, seq_len=5)
    pieces = [prepared.train[at].tokens.tolist() for at in range(len(prepared.train))]
    assert pieces == [[256, *ids("0123")], ids("45678"), [*ids("9"), 257]]
    assert (prepared.counts.used, prepared.counts.cut, prepared.counts.trained) == (1, 1, 4 + 4 + 1)
    assert len(prepare_files(tmp_path, tokenizer, path, seq_len=5, too_long="cut_end").train) == 1


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"prompt": "q", "response": ""}] * 3, {}, r"only 0 of 3 rows of .* can be trained on \(3 empty"),
        ([*["{"] * 200, ROWS[0]], {}, r"only 1 of 201 rows of .* can be trained on \(200 bad\)"),
        (ROWS, {"seq_len": 5}, r"only 0 of 20 rows of .* can be trained on .*20 too long"),
        (["{"], {}, "holds no rows: .*a.jsonl:1: not JSON"),
        ([{"messages": [{"role": "user", "content": "q"}]}], {}, "no answer to train on"),
        ([{"messages": chat("q", "a")}], {"template": "{{ 'x' }}"}, "leaves out or rewrites"),
        ([{"messages": chat("q", "a")}], {"template": "{{ raise_exception('no roles') }}"}, "rejects it: no roles"),
    ],
)
def test_almost_nothing_to_train_on_is_an_error(
    tmp_path: Path, tokenizer: Any, rows: list[Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        prepare_files(tmp_path, tokenizer, write_rows(tmp_path / "a.jsonl", rows), **keys)
    assert not list((tmp_path / "store").iterdir()), "nothing is left behind"


def test_rows_that_are_not_utf_8_are_skipped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    lines = [json.dumps(row).encode() for row in ROWS[:3]]
    lines[1] = lines[1].replace(b"aa", "ü".encode("latin-1"))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    stats = prepare_files(tmp_path, tokenizer, tmp_path / "a.jsonl").counts
    assert (stats.used, stats.bad) == (2, 1)
    assert (stats.skipped[0].place, stats.skipped[0].why) == (f"{tmp_path}/a.jsonl:2", "'response' is not UTF-8 text")


def test_notes_special_tokens_that_the_tokenizer_lacks(tmp_path: Path, tokenizer: Any, data: Path) -> None:
    notes = prepare_files(tmp_path, tokenizer, data, template="chatml").notes
    assert notes[0] == "the template writes <|im_start|>, <|im_end|>, which the tokenizer reads as plain text"
    assert notes[1].startswith("the template ends answers without a special token")


def test_rows_that_the_template_rejects_are_skipped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": chat("q", "a")}, {"messages": [{"role": "assistant", "content": "a"}]}]
    stats = prepare_files(tmp_path, tokenizer, write_rows(tmp_path / "a.jsonl", rows), template="mistral").counts
    assert (stats.used, stats.bad) == (1, 1)
    assert "take turns" in stats.skipped[0].why


def test_stores_are_reused_until_something_changes(tmp_path: Path, data: Path, tokenizer: Any, folder: Path) -> None:
    first = prepare_files(tmp_path, tokenizer, data)
    stamp = (first.folder / "facts.json").stat().st_mtime_ns
    again = prepare_files(tmp_path, tokenizer, data)
    assert (again.fingerprint, (again.folder / "facts.json").stat().st_mtime_ns) == (first.fingerprint, stamp)
    assert (again.counts, again.decisions, again.notes) == (first.counts, first.decisions, first.notes)
    moved = data.rename(tmp_path / "moved.jsonl")
    assert prepare_files(tmp_path, tokenizer, moved).fingerprint == first.fingerprint, (
        "the content counts, not the name"
    )
    others = [
        prepare_files(tmp_path, tokenizer, moved, **keys)
        for keys in ({"seq_len": 30}, {"loss_on": "last"}, {"template": "raw"}, {"val": 2}, {"system": "s"})
    ]
    others.append(prepare_files(tmp_path, with_tokens(folder, "<x>"), moved))
    settings = data_settings({"data": [{"path": str(moved)}]})
    others.append(prepare(settings, tokenizer, tmp_path / "store", extra_key="x"))
    moved.write_text(moved.read_text().replace("q1", "Q1"))
    others.append(prepare_files(tmp_path, tokenizer, moved))
    assert len({first.fingerprint, *(one.fingerprint for one in others)}) == 9


def test_padding_and_truncation_of_the_tokenizer_do_not_count(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    first = prepare_files(tmp_path, tokenizer, data).fingerprint
    tokenizer(["a", "longer"], padding=True, truncation=True, max_length=3)
    assert prepare_files(tmp_path, tokenizer, data).fingerprint == first


def test_python_rows_as_a_source(tmp_path: Path, tokenizer: Any, data: Path) -> None:
    settings = DataSettings((DataSource("mine", rows=tuple(ROWS)),))
    prepared = prepare(settings, tokenizer, tmp_path / "store")
    assert rows_in(prepared.train, tokenizer) == rows_in(prepare_files(tmp_path, tokenizer, data).train, tokenizer)
    assert prepared.counts.sources.keys() == {"mine"}


def test_store_works_in_another_process(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    store = prepare_files(tmp_path, tokenizer, data).train
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        tokens = pool.apply(_tokens, (store, 7))
    assert tokens == store[7].tokens.tolist()
    assert store[7].tokens.flags.writeable, "torch.from_numpy warns about read-only arrays"
    assert store.lengths.tolist() == [len(store[at]) for at in range(len(store))]
    assert store.lengths.dtype == np.int32


def _tokens(store: TokenStore, at: int) -> list[int]:
    return [int(token) for token in store[at].tokens]


def test_damaged_store_is_an_error(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    prepared = prepare_files(tmp_path, tokenizer, data)
    with open(prepared.folder / "labels.i32", "r+b") as file:
        file.truncate(8)
    with pytest.raises(SourceError, match="its files do not match"):
        prepare_files(tmp_path, tokenizer, data)
    with pytest.raises(SourceError, match="no token store 'other'"):
        TokenStore.open(prepared.folder, "other")


def test_unwritable_folder_is_an_error(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(MergeforgeError, match="cannot be written"):
        prepare_files(tmp_path, tokenizer, data)


def test_all_examples_of_a_row_are_on_one_side_of_the_split(tmp_path: Path, folder: Path) -> None:
    rows = [{"messages": chat(f"q{at}", "<think>x</think>a", "more", "<think>y</think>b")} for at in range(8)]
    prepared = prepare_files(tmp_path, chatml(folder, REASONING), write_rows(tmp_path / "a.jsonl", rows), val=0.25)
    assert prepared.validation is not None and (len(prepared.train), len(prepared.validation)) == (12, 4)
    assert (prepared.counts.used, prepared.counts.examples, prepared.counts.duplicates) == (8, 16, 0)
    assert "in 8 rows each answer is an example of its own" in prepared.notes[0]


MEASURED = """
import json, resource, sys
from pathlib import Path
from mergeforge.data import data_settings, load_tokenizer, prepare
folder, rows = Path(sys.argv[1]), int(sys.argv[2])
path = folder / f"{rows}.jsonl"
with open(path, "w") as file:
    for at in range(rows):
        file.write(json.dumps({"text": f"{at} " * 20}) + chr(10))
tokenizer = load_tokenizer(sys.argv[3])
few = folder / "few.jsonl"
few.write_text("".join(path.read_text().splitlines(keepends=True)[:3000]))
prepare(data_settings({"data": [str(few)]}), tokenizer, folder / "store")  # several batches of the tokenizer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepared = prepare(data_settings({"data": [str(path)], "val": 0.1}), tokenizer, folder / "store")
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(prepared.train)]))
"""


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, folder: Path) -> None:
    """10,000 rows of 100 tokens are 8 MB of tokens and labels; after 3,000 rows memory grows by less than 6 MB."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path), "10000", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, rows = json.loads(done.stdout.splitlines()[-1])
    assert rows == 9000
    assert grown < 6 * 1024, f"{grown} KiB"


def test_character_stats(data: Path) -> None:
    stats = character_stats(data_settings({"data": [{"path": str(data)}, {"path": "sample:chat"}]}))
    own = stats.counts.sources[str(data)]
    assert (own.used, own.tokens, own.longest) == (20, 0, len("q20") + 20)
    assert (stats.counts.rows, [one.format for one in stats.decisions]) == (40, ["prompt_response", "messages"])


def test_prompts_of_the_first_rows(data: Path) -> None:
    settings = data_settings({"data": [{"path": str(data)}], "system": "S"})
    system = {"role": "system", "content": "S"}
    assert first_prompts(settings, 2) == [[system, {"role": "user", "content": f"q{at}"}] for at in (1, 2)]

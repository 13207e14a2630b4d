"""Texts from every kind of source, with every special token exactly once."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from common.errors import InputError
from regmean.calibration import collate, load_calibration, make_batches
from regmean.config import GramFlags, TextSource
from tests.regmean.conftest import make_tokenizer

ROWS = [{"question": "w0 w1", "answer": "w2", "note": None}, {"question": "w3", "answer": "w4 w5 w6", "note": None}]


def source(dataset: Path, **options: Any) -> TextSource:
    return GramFlags(model="m", dataset=str(dataset), output_dir="o", **options).texts()


def texts_of(calibration: Any) -> list[str]:
    return [" ".join(make_tokenizer().convert_ids_to_tokens(ids)) for ids in calibration.examples]


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet", "folder", "saved"])
def test_every_source(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    if form == "json":
        path.write_text(json.dumps(ROWS))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif form == "folder":
        path.mkdir()
        (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    calibration = load_calibration(source(path, text_column="question"), make_tokenizer())
    assert texts_of(calibration) == ["<s> w0 w1", "<s> w3"]
    calibration = load_calibration(source(path, text_column="question", num_examples=1), make_tokenizer())
    assert len(calibration.examples) == 1


def test_splits_are_joined_and_cut_before_rows_are_counted(tmp_path: Path) -> None:
    folder, saved = tmp_path / "folder", tmp_path / "saved"
    folder.mkdir()
    for split in ("train", "test"):
        rows_file(folder, ROWS).rename(folder / f"{split}.jsonl")
    for split, count, expected in (
        ("train+test", 3, ["<s> w0 w1", "<s> w3", "<s> w0 w1"]),
        ("test[1:]", 9, ["<s> w3"]),
    ):
        rows = source(folder, text_column="question", split=split, num_examples=count)
        assert texts_of(load_calibration(rows, make_tokenizer())) == expected
    rows = source(folder / "train.jsonl", text_column="question", split="train[:1]")
    assert texts_of(load_calibration(rows, make_tokenizer())) == ["<s> w0 w1"]
    datasets.load_dataset("json", data_files={"test": str(folder / "test.jsonl")}, split="test[:1]").save_to_disk(saved)
    for split in ("train", "test"):
        rows = source(saved, text_column="question", split=split)
        assert texts_of(load_calibration(rows, make_tokenizer())) == ["<s> w0 w1"]
    with pytest.raises(
        InputError, match=r"saved --split dev: the folder holds one split, test\[:1\]: leave --split out"
    ):
        load_calibration(source(saved, text_column="question", split="dev"), make_tokenizer())


def rows_file(path: Path, rows: list[dict]) -> Path:
    path = path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_chat_columns_go_through_the_template_with_one_bos(tmp_path: Path) -> None:
    path = rows_file(tmp_path, ROWS)
    chat = source(path, user_column="question", assistant_column="answer")
    assert texts_of(load_calibration(chat, make_tokenizer())) == [
        "<s> <|user|> w0 w1 <|assistant|> w2 </s>",
        "<s> <|user|> w3 <|assistant|> w4 w5 w6 </s>",
    ]
    # As published: the template's text is tokenized like any other, with a second bos.
    tokenizer = make_tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "w0"}], tokenize=False)
    assert tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    whole = source(path, system_column="answer", user_column="question", assistant_column="note", max_length=4)
    calibration = load_calibration(whole, make_tokenizer())
    assert texts_of(calibration) == ["<s> <|system|> w2 <|user|>", "<s> <|system|> w4 w5"]
    assert (calibration.truncated, calibration.empty) == (2, 0)


def test_a_text_that_spells_out_its_bos_has_one(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": "<s> w1"}])
    assert texts_of(load_calibration(source(path, text_column="text"), make_tokenizer())) == ["<s> w1"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"text_column": "text"}, "no column 'text'; it has question, answer"),
        ([{"text": 7}], {"text_column": "text"}, "row 0, column 'text' is no text"),
        ([{"text": None}], {"user_column": "text"}, "no row has any text"),
        (ROWS, {"text_column": "question", "split": "test"}, "--split test"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict], options: dict, message: str) -> None:
    path = rows_file(tmp_path, rows)
    if options.get("split"):
        (tmp_path / "folder").mkdir()
        path = path.rename(tmp_path / "folder" / "train.jsonl").parent
    with pytest.raises(InputError, match=message):
        load_calibration(source(path, **options), make_tokenizer())


def test_a_row_that_the_chat_template_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    chat = source(rows_file(tmp_path, ROWS), system_column="answer", user_column="question")
    with pytest.raises(InputError, match="row 0: the chat template of --model .* refuses it: no system role; leave"):
        load_calibration(chat, tokenizer)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ')
    (tmp_path / "a.csv").write_text("text\nw1\n")
    for name, message in (
        ("a.jsonl", "cannot be loaded"),
        ("a.csv", "expected one of"),
        ("b.jsonl", "cannot be loaded"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_calibration(source(tmp_path / name, text_column="text"), make_tokenizer())
        assert name in str(error.value)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template; give --text_column"):
        load_calibration(source(rows_file(tmp_path, ROWS), user_column="question"), tokenizer)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("budget", [1, 7, 20, 1000])
def test_batches_hold_every_example_once_within_the_budget(budget: int, padding: bool) -> None:
    lengths = [3, 9, 1, 5, 5, 2, 9, 1, 1, 4]
    batches = make_batches(lengths, budget, padding)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[index] for index in batch) <= max(budget, 9)
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
        assert padding or len({lengths[index] for index in batch}) == 1
    if budget == 1000:
        assert len(batches) == (1 if padding else len(set(lengths)))


def test_padding_stands_on_the_right_and_is_masked() -> None:
    ids, mask = collate([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]

import random
from collections import Counter
from pathlib import Path

import pytest

from common.errors import InputError
from mindmerger.data import hold_out, read_evaluation
from mindmerger.data import read_training as iterate_training
from mindmerger.tasks import (
    EVALUATION_TASKS,
    LANGUAGES,
    TRAINING_TASKS,
    Example,
    prompt_template,
    select_languages,
    translation,
)
from tests.mindmerger.datas import ROWS, sentence, write_datas


def read_training(*given: object, **more: object) -> list[Example]:
    return list(iterate_training(*given, **more))


@pytest.fixture
def datas(tmp_path: Path) -> Path:
    write_datas(tmp_path)
    return tmp_path


@pytest.mark.parametrize("task", TRAINING_TASKS.values(), ids=lambda task: task.name)
def test_mapping_stage_reads_pairs_of_every_language_of_the_task(datas: Path, task: object) -> None:
    rows = read_training(datas, task, "mapping", None, 5)
    assert Counter(row.language for row in rows) == dict.fromkeys(task.languages, 5)
    row = rows[7]
    assert (row.source.text, row.target) == (sentence(row.language.name, 2), sentence("English", 2))


def test_augmentation_stage_reads_what_languages_there_are(datas: Path) -> None:
    counts = {}
    for name, task in TRAINING_TASKS.items():
        rows = read_training(datas, task, "augmentation", None, 100)
        counts[name] = Counter(row.language.code for row in rows)
    assert counts["math"] == {"de": ROWS, "sw": ROWS, "en": ROWS}
    assert counts["x-csqa"] == {
        language.code: ROWS for language in (*TRAINING_TASKS["x-csqa"].languages, LANGUAGES["English"])
    }
    assert counts["xnli"] == {language.code: ROWS for language in TRAINING_TASKS["xnli"].languages}
    chosen = read_training(datas, TRAINING_TASKS["math"], "augmentation", select_languages("Swahili,en"), 3)
    assert [row.language.code for row in chosen] == ["sw"] * 3 + ["en"] * 3


def test_training_rows_are_read_one_by_one_and_prompts_built_where_they_are_used(
    datas: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (datas / "bilingual_pairs/en-sw/train_100k.sw").write_text("a\n\nb\n")
    monkeypatch.setattr(translation, "translation_prompt", lambda *_: pytest.fail("a prompt is built"))
    german = iterate_training(
        datas, TRAINING_TASKS["math"], "mapping", select_languages("de,sw"), 5, with_prompts=False
    )
    rows = [next(german) for _ in range(5)]
    assert {row.prompt.text for row in rows} == {""} and rows[0].target == sentence("English", 0)
    with pytest.raises(InputError, match=r"train_100k\.sw, line 2: the line is empty"):
        next(german)


def test_rows_beyond_the_limit_are_checked_too(datas: Path) -> None:
    path = datas / CSQA
    path.write_text(path.read_text() + "[]\n")
    with pytest.raises(InputError, match=rf"train_de.jsonl, line {ROWS + 1}: expected a JSON object"):
        read_training(datas, TRAINING_TASKS["x-csqa"], "augmentation", select_languages("de"), 2)


def test_published_prompts_to_the_letter(datas: Path) -> None:
    def first(task: str, stage: str) -> object:
        return read_training(datas, TRAINING_TASKS[task], stage, select_languages("de"), 1)[0]

    source = "German 0: Äpfel ?"
    assert first("math", "mapping").prompt.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n### Instruction:\n"
        f"Translate the following sentences from German to English.\n### Input:\n{source}\n### Response:"
    )
    math = first("math", "augmentation")
    assert math.source.text == source
    assert math.prompt.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{source}\n\n### Response: Let's think step by step."
    )
    csqa = first("x-csqa", "augmentation")
    options = "A. Ort A\tB. Ort B\tC. Ort C\tD. Ort D\tE. Ort E"
    assert csqa.source.text == csqa.prompt.text == f"{source}\nOptions:{options}\nAnswer:"
    assert (csqa.target, csqa.labels) == ("A", tuple("ABCDE"))
    nli = first("xnli", "augmentation")
    assert nli.source.text == nli.prompt.text == f"Premise: {source}\nHypothesis: Ja.\nLabel:"
    assert (nli.target, nli.labels) == ("entailment", ("entailment", "neutral", "contradiction"))


@pytest.mark.parametrize("task", EVALUATION_TASKS.values(), ids=lambda task: task.name)
def test_evaluation_reads_every_language(datas: Path, task: object) -> None:
    problems = read_evaluation(datas, task, task.languages)
    assert {language: len(rows) for language, rows in problems.items()} == dict.fromkeys(task.languages, 2)
    assert read_evaluation(datas, task, task.languages[:1], 1)[task.languages[0]] == problems[task.languages[0]][:1]


def test_label_words_are_spelled_as_the_file_has_them(datas: Path) -> None:
    path = datas / "evaluation/xnli/test.json"
    path.write_text(path.read_text().replace('"neutral"', '"Neutral"'))
    rows = read_evaluation(datas, EVALUATION_TASKS["xnli"], (LANGUAGES["German"],))[LANGUAGES["German"]]
    assert (rows[1].target, rows[1].labels) == ("Neutral", ("Entailment", "Neutral", "Contradiction"))


def test_real_data_is_read_whole(shared_datas: Path) -> None:
    problems = read_evaluation(shared_datas, EVALUATION_TASKS["mgsm"], EVALUATION_TASKS["mgsm"].languages)
    assert {len(rows) for rows in problems.values()} == {250} and len(problems) == 11
    rows = read_training(shared_datas, TRAINING_TASKS["math"], "mapping", select_languages("de,es,fr,ru,sw"), 100_000)
    assert len(rows) == 7464 + 7468 + 7464 + 7360 + 7469
    assert len(read_training(shared_datas, TRAINING_TASKS["math"], "augmentation", None, 100_000)) == 44_627
    msvamp = read_evaluation(shared_datas, EVALUATION_TASKS["msvamp"], select_languages("en,de,sw,zh"))
    assert {len(rows) for rows in msvamp.values()} == {1000}


def test_line_separators_inside_a_sentence_end_no_row(datas: Path) -> None:
    path = datas / "bilingual_pairs/en-de/train_100k.de"
    path.write_bytes(path.read_bytes().replace("Äpfel ".encode(), "Äp\u2028fel\u0085\r ".encode()))
    assert len(read_training(datas, TRAINING_TASKS["math"], "mapping", select_languages("de"), 100)) == ROWS


MATH, CSQA = "query_translation/math.json", "query_translation/x-csqa/train_de.jsonl"
PAIRS, MGSM = "bilingual_pairs/en-de/train_100k.de", "evaluation/mgsm/mgsm_de.tsv"
MSVAMP, XNLI = "evaluation/msvamp/test_German.jsonl", "evaluation/xnli/test.json"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (PAIRS, None, "no such file (--data_dir"),
        (PAIRS, "", "the file is empty"),
        (PAIRS, "a\n" * (ROWS - 1), f"has {ROWS - 1} lines but"),
        (PAIRS, "a\n" * (ROWS + 1), f"has {ROWS + 1} lines but"),
        (PAIRS, "a\n\nb\n", "line 2: the line is empty"),
        (PAIRS, b"a\n\xff\n", "not UTF-8 at byte 2"),
        (MATH, "[{", "not JSON"),
        (MATH, "{}", "expected a JSON list of objects"),
        (MATH, "[1]", "row 1: expected a JSON object"),
        (MATH, '[{"query": "q", "response": "r", "lang": "Germane"}]',
         "row 1: unknown language 'Germane'; did you mean"),
        (MATH, '[{"query": "q", "lang": "German"}]', "row 1: 'response' must be a text, found None"),
        (MATH, '[{"query": 7, "response": "r", "lang": "German"}]', "row 1: 'query' must be a text, found 7"),
        (MATH, '[{"query": "q", "response": "r", "lang": "French"}]', "no augmentation rows of task math in German"),
        (CSQA, "{}\nnot json\n", "line 1: expected"),
        (CSQA, "not json\n", "line 1: not JSON"),
        (CSQA, '{"answerKey": "F", "question": {"stem": "s", "choices": [{"label": "A", "text": "t"}]}}\n',
         "line 1: answerKey 'F' is not one of the 1 choices"),
        (CSQA, '{"answerKey": "A", "question": {"stem": "s", "choices": [{"label": "B", "text": "t"}]}}\n',
         "line 1: the choices' labels must be A, B, C, D, E, in this order"),
        (MGSM, "question without answer\n", "line 1: expected question<TAB>answer, found 1 field(s)"),
        (MGSM, "q\tmany\n", "line 1: the answer 'many' is not a number"),
        (MSVAMP, '{"m_query": "q"}\n', "line 1: 'response' must be a text"),
        (XNLI, '[{"sentence1": "a", "sentence2": "b", "label": "no", "language": "German"}]', "row 1: label 'no'"),
        (XNLI, '[{"sentence1": "a", "sentence2": "b", "label": "NEUTRAL", "language": "German"}]',
         "row 1: label 'NEUTRAL' is not one of Entailment, Neutral, Contradiction"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(datas: Path, file: str, content: str | bytes | None, message: str) -> None:
    path = datas / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    german = select_languages("de")
    with pytest.raises(InputError) as error:
        if file.startswith("evaluation"):
            read_evaluation(datas, EVALUATION_TASKS[file.split("/")[1]], german)
        elif file == PAIRS:
            read_training(datas, TRAINING_TASKS["math"], "mapping", german, 100)
        else:
            read_training(datas, TRAINING_TASKS["math" if file == MATH else "x-csqa"], "augmentation", german, 100)
    assert message in str(error.value)
    assert path.name in str(error.value) or "no augmentation rows" in message


def test_hold_out_splits_once_and_leaves_something() -> None:
    dev, train = hold_out(24, 5, seed=0)
    assert len(dev) == 5 and sorted([*dev, *train]) == list(range(24))
    # The same split as for a list of rows.
    shuffled = list(range(24))
    random.Random(0).shuffle(shuffled)
    assert [*dev, *train] == shuffled
    assert [*dev] != [*hold_out(24, 5, seed=1)[0]]
    with pytest.raises(InputError, match="--dev_size 24 holds out all of the 24 training rows"):
        hold_out(24, 24, seed=0)


def test_languages_are_selected_by_name_or_code() -> None:
    assert [language.code for language in select_languages("german, SW")] == ["de", "sw"]
    with pytest.raises(InputError, match="^--languages: unknown language 'Swahilli'; did you mean Swahili"):
        select_languages("de,Swahilli")
    with pytest.raises(InputError, match="named twice"):
        select_languages("de,German")


@pytest.mark.parametrize("task", TRAINING_TASKS.values(), ids=lambda task: task.name)
def test_the_template_on_record_is_what_surrounds_a_rows_words(datas: Path, task: object) -> None:
    template = prompt_template(task.name, "augmentation")
    before, after = template.split("{", 1)[0], template.rsplit("}", 1)[1]
    for row in read_training(datas, task, "augmentation", None, 2):
        assert row.prompt.text.startswith(before) and row.prompt.text.endswith(after)

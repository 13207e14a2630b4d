"""A small `datas` folder in the published layout, all four tasks, for tests that read, train on or damage it."""

import json
from pathlib import Path

from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, TRAINING_TASKS

ROWS = 12


def sentence(language: str, number: int) -> str:
    return f"{language} {number}: " + "Äpfel " * (number % 5 + 1) + "?"


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_datas(folder: Path) -> None:
    """Write `ROWS` rows of every training file and two problems of every evaluation file."""
    languages = {language for task in TRAINING_TASKS.values() for language in task.languages}
    for language in languages:
        pairs = folder / "bilingual_pairs" / f"en-{language.code}"
        write_lines(pairs / f"train_100k.{language.code}", [sentence(language.name, n) for n in range(ROWS)])
        write_lines(pairs / "train_100k.en", [sentence("English", n) for n in range(ROWS)])

    queries = folder / "query_translation"
    math = [
        {"query": sentence(name, n), "response": f"It is {n}.\nThe answer is: {n}", "lang": name}
        for name in ("German", "Swahili", "English")
        for n in range(ROWS)
    ]
    write_lines(queries / "math.json", [json.dumps(math, ensure_ascii=False)])
    for language in (*TRAINING_TASKS["x-csqa"].languages, LANGUAGES["English"]):
        lines = [json.dumps(x_csqa(language.name, n), ensure_ascii=False) for n in range(ROWS)]
        write_lines(queries / "x-csqa" / f"train_{language.code}.jsonl", lines)
        write_lines(folder / "evaluation" / "x-csqa" / language.code / "dev.jsonl", lines[:2])
    nli = [xnli(language.name, n) for language in TRAINING_TASKS["xnli"].languages for n in range(ROWS)]
    write_lines(queries / "xnli_dev.json", [json.dumps(nli, ensure_ascii=False)])
    nli = [xnli(language.name, n) for language in EVALUATION_TASKS["xnli"].languages for n in range(2)]
    write_lines(folder / "evaluation" / "xnli" / "test.json", [json.dumps(nli, ensure_ascii=False)])

    for language in EVALUATION_TASKS["mgsm"].languages:
        lines = [f"{sentence(language.name, n)}\t1,00{n}" for n in range(2)]
        write_lines(folder / "evaluation" / "mgsm" / f"mgsm_{language.code}.tsv", lines)
    for language in EVALUATION_TASKS["msvamp"].languages:
        lines = [json.dumps({"m_query": sentence(language.name, n), "response": f"{n}.0"}) for n in range(2)]
        write_lines(folder / "evaluation" / "msvamp" / f"test_{language.name}.jsonl", lines)


def x_csqa(language: str, number: int) -> dict:
    choices = [{"label": letter, "text": f"Ort {letter}"} for letter in "ABCDE"]
    return {"answerKey": "ABCDE"[number % 5], "question": {"stem": sentence(language, number), "choices": choices}}


def xnli(language: str, number: int) -> dict:
    label = ("entailment", "neutral", "contradiction")[number % 3]
    return {"sentence1": sentence(language, number), "sentence2": "Ja.", "label": label, "language": language}

"""Builds the `datas` layout of all tasks from public sources: `python -m tools.prepare_data`"""

import functools
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, sha256, write_json, write_text
from mindmerger.config import require_positive
from mindmerger.data import MANIFEST, read_evaluation, read_training
from mindmerger.evaluation.answers import parse_answer
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, TRAINING_TASKS, Language, find_task, select_languages
from tools import sources
from tools.sources import SOURCES, Reading, pairs_source

# --train_num of the published augmentation stage: more rows of a language than that are not read.
MATH_ROWS = 30_000
# Characters of a sentence, and how many times as long its translation may be (Chinese to English: about 3).
SHORTEST, LONGEST, RATIO = 3, 500, 6
# Translated solutions whose answer is the English one's; fewer mean that the rows are not in the order that is assumed.
LEAST_ALIGNED = 0.9

_EVALUATIONS = {"math": ("mgsm", "msvamp"), "x-csqa": ("x-csqa",), "xnli": ("xnli",)}
Row = TypeVar("Row")


@dataclass
class PrepareDataFlags:
    """Build the data layout of training and evaluation from public sources."""

    output_dir: str = flag("./datas", "folder to build; what its manifest.json lists, unchanged, is kept")
    task: str = flag(",".join(TRAINING_TASKS), "comma-separated: math, x-csqa, xnli")
    languages: str | None = flag(None, "comma-separated English names or ISO codes; default: all of the tasks'")
    pairs: Literal["corpora", "questions"] = flag(
        "corpora",
        "sentence pairs from OPUS-100 and NLLB, or GSM8K's questions and their translations, as the small runs on real "
        "models take",
    )
    train_num: int = flag(100_000, "sentence pairs per language")
    source_dir: str | None = flag(None, "local copies, {source_dir}/{dataset id}/...; default: the Hugging Face Hub")
    check_counts: bool = flag(True, "refuse a source that has not as many rows as are published")

    def __post_init__(self) -> None:
        require_positive(self, "train_num")
        if self.pairs == "questions" and self.task != "math":
            raise InputError(f"--pairs questions are GSM8K's: take --task math, not {self.task}")


class Layout:
    """The folder that is built, and its manifest, which is written after every file."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.files: dict[str, dict[str, Any]] = {}
        if (folder / MANIFEST).exists():
            manifest = read_json(folder / MANIFEST)
            known = manifest.get("settings") if isinstance(manifest, dict) else None
            # Folders from before there was --pairs have those of the corpora.
            if not isinstance(known, dict) or {"pairs": "corpora"} | known != settings:
                raise InputError(f"{folder} was built with other settings: choose another --output_dir, or remove it")
            self.files = manifest["files"]
        elif folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} holds files that are not from here: choose another --output_dir")

    def has(self, *names: str) -> bool:
        """Whether these files are there as they were written."""
        return all(
            name in self.files
            and (self.folder / name).is_file()
            and sha256(self.folder / name) == self.files[name]["sha256"]
            for name in names
        )

    def write(
        self, readings: list[Reading], texts: dict[str, str], rows: int, dropped: dict[str, int] | None = None
    ) -> None:
        """Write files that stem from `readings`, each whole or not at all, and then the manifest."""
        for name, text in texts.items():
            write_text(self.folder / name, text)
            self.files[name] = {
                "rows": rows,
                "sha256": sha256(self.folder / name),
                "sources": [reading.record() for reading in readings],
                "dropped": dict(dropped or {}),
            }
        write_json(self.folder / MANIFEST, {"settings": self.settings, "files": dict(sorted(self.files.items()))})
        left_out = f", left out: {', '.join(f'{n} {why}' for why, n in dropped.items())}" if dropped else ""
        print(f"{' and '.join(texts)}: {rows} rows{left_out}", flush=True)


@dataclass(frozen=True)
class EvaluationFiles:
    """One file for each language of an evaluation task.

    Attributes:
        path: pattern of the file's path in the layout, of a language.
        source: name of its source.
        convert: from the source's row to the file's.
        question: from a line of the file to the question in it.
    """

    path: str
    source: str
    convert: Callable[[dict[str, Any]], Any]
    question: Callable[[str], str]


_EVALUATION_FILES = {
    "mgsm": EvaluationFiles(
        "evaluation/mgsm/mgsm_{0.code}.tsv", "mgsm", sources.mgsm, lambda line: line.split("\t")[0]
    ),
    "msvamp": EvaluationFiles(
        "evaluation/msvamp/test_{0.name}.jsonl", "msvamp", sources.msvamp, lambda line: json.loads(line)["m_query"]
    ),
    "x-csqa": EvaluationFiles(
        "evaluation/x-csqa/{0.code}/dev.jsonl",
        "x_csqa_dev",
        sources.x_csqa,
        lambda line: json.loads(line)["question"]["stem"],
    ),
}
_XNLI_TEST = "evaluation/xnli/test.json"


def prepare(flags: PrepareDataFlags) -> None:
    """Build every file of the tasks, evaluation first, since nothing of it may be in training.

    Raises:
        InputError: a source that cannot be read, or is not as published; a folder that is not this command's.
    """
    source_dir = None if flags.source_dir is None else Path(flags.source_dir)
    tasks = [find_task(name, TRAINING_TASKS) for name in flags.task.split(",")]
    chosen = select_languages(flags.languages)
    settings = {name: getattr(flags, name) for name in ("task", "languages", "pairs", "train_num", "source_dir")}
    layout = Layout(Path(flags.output_dir), settings)
    read = functools.partial(Reading, source_dir=source_dir, check_count=flags.check_counts)

    def wanted(*languages: Language) -> tuple[Language, ...]:
        return tuple(language for language in languages if chosen is None or language in chosen)

    questions: set[str] = set()
    for task in tasks:
        for name in _EVALUATIONS[task.name]:
            languages = wanted(*EVALUATION_TASKS[name].languages)
            if languages:
                build_evaluation(layout, read, name, languages)
                # What training or evaluation would refuse in a row is refused here.
                read_evaluation(layout.folder, EVALUATION_TASKS[name], languages)
                questions |= evaluation_keys(layout.folder, name, languages)

    english = wanted(LANGUAGES["English"])
    for task in tasks:
        if task.name == "math":
            languages = wanted(*task.languages, LANGUAGES["English"])
            build_math(layout, read, languages, questions)
        elif task.name == "x-csqa":
            languages = english
            build_x_csqa_training(layout, read, languages, questions)
        else:
            languages = wanted(*EVALUATION_TASKS["xnli"].languages)
            build_xnli_dev(layout, read, languages, questions)
        if languages:
            list(read_training(layout.folder, task, "augmentation", languages, 1))
    for task in tasks:
        languages = wanted(*task.languages)
        for language in languages:
            build_pairs(layout, read, language, flags.pairs, questions, flags.train_num)
        if languages:
            list(read_training(layout.folder, task, "mapping", languages, 1))


def build_evaluation(layout: Layout, read: Callable[..., Reading], name: str, languages: tuple[Language, ...]) -> None:
    """The problems of one evaluation task: a file for each language, or XNLI's one file."""
    if name == "xnli":
        if not layout.has(_XNLI_TEST):
            readings, rows = _xnli_rows(read, "xnli_test", languages)
            layout.write(readings, {_XNLI_TEST: _json_list(rows)}, len(rows))
        return
    files = _EVALUATION_FILES[name]
    for language in languages:
        path = files.path.format(language)
        if not layout.has(path):
            reading = read(SOURCES[files.source], language)
            rows = list(converted(reading, files.convert))
            layout.write([reading], {path: _lines(rows)}, len(rows))


def build_math(
    layout: Layout, read: Callable[..., Reading], languages: tuple[Language, ...], questions: set[str]
) -> None:
    """GSM8K questions in all languages and MetaMathQA in English, each with its English solution."""
    name = "query_translation/math.json"
    if not languages or layout.has(name):
        return
    parallel = read(SOURCES["gsm8k_instruct"], None)
    rows, dropped = translated_questions(converted(parallel, sources.gsm8k_instruct), parallel.place)
    readings = [parallel]
    if LANGUAGES["English"] in languages:
        readings.append(read(SOURCES["metamath"], None))
        rows += converted(readings[-1], sources.metamath)
    kept = []
    for language in languages:
        mine = (row for row in rows if row["lang"] == language.name)
        mine, left_out = clean(mine, lambda row: sentence_key(row["query"]), questions)
        kept += mine[:MATH_ROWS]
        dropped += left_out
    layout.write(readings, {name: _json_list(kept)}, len(kept), dropped)


def build_x_csqa_training(
    layout: Layout, read: Callable[..., Reading], languages: tuple[Language, ...], questions: set[str]
) -> None:
    """The English training questions, the only ones that are published."""
    for language in languages:
        name = f"query_translation/x-csqa/train_{language.code}.jsonl"
        if not layout.has(name):
            rows = converted(reading := read(SOURCES["x_csqa_train"], language), sources.x_csqa)
            kept, dropped = clean(rows, lambda row: sentence_key(row["question"]["stem"]), questions)
            layout.write([reading], {name: _lines(kept)}, len(kept), dropped)


def build_xnli_dev(
    layout: Layout, read: Callable[..., Reading], languages: tuple[Language, ...], questions: set[str]
) -> None:
    """XNLI's dev set, which is what the published mappings were trained on."""
    name = "query_translation/xnli_dev.json"
    if languages and not layout.has(name):
        readings, rows = _xnli_rows(read, "xnli_dev", languages)
        kept, dropped = clean(rows, lambda row: sentence_key(row["sentence1"] + row["sentence2"]), questions)
        layout.write(readings, {name: _json_list(kept)}, len(kept), dropped)


def build_pairs(
    layout: Layout, read: Callable[..., Reading], language: Language, kind: str, questions: set[str], limit: int
) -> None:
    """Sentence pairs of one language, line n of one file translating line n of the other; `kind` as in `--pairs`."""
    folder = f"bilingual_pairs/en-{language.code}"
    names = f"{folder}/train_100k.{language.code}", f"{folder}/train_100k.en"
    if layout.has(*names):
        return
    if kind == "questions":
        reading = read(SOURCES["gsm8k_instruct"], None)
        rows, _ = translated_questions(converted(reading, sources.gsm8k_instruct), reading.place)
        found = question_pairs(rows, language)
    else:
        reading = read(pairs_source(language), language)
        found = converted(reading, lambda row: sources.sentence_pair(row, language))
    pairs, dropped = clean_pairs(found, questions, limit)
    if not pairs:
        raise InputError(f"{reading.place}: no sentence pair in {language.name} is left after cleaning")
    texts = {name: _lines(side) for name, side in zip(names, zip(*pairs, strict=True), strict=True)}
    layout.write([reading], texts, len(pairs), dropped)


def converted(reading: Reading, convert: Callable[[dict[str, Any]], Row]) -> Iterator[Row]:
    """Every row through `convert`.

    Raises:
        InputError: a row is not of the schema that `convert` knows.
    """
    for row in reading:
        try:
            yield convert(row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{reading.place}: not the schema that {reading.source.dataset} was published in: "
                f"{type(error).__name__}: {error}; its columns are {', '.join(row)}"
            ) from error


def translated_questions(rows: Iterable[tuple[str, str, str]], place: str) -> tuple[list[dict[str, str]], Counter[str]]:
    """Give every translated question the English solution.

    Args:
        rows: (language, question, solution); an English row, then its translations, then the next English one.
        place: of the source, for messages.

    Returns:
        Rows of `{query, response, lang}`, and how many were left out for which reason: a translation counts only
        where its own solution ends in the English answer, which also proves the order.

    Raises:
        InputError: that holds for too few of them.
    """
    kept, dropped = [], Counter()
    english, answer = None, None
    translations = aligned = 0
    for language, question, text in rows:
        if language == "English":
            english = sources.solution(text)
            answer = None if english is None else parse_answer(english)
        else:
            translations += 1
            aligned += answer is not None and parse_answer(text) == answer
        if english is None:
            dropped["without an English answer"] += 1
        elif parse_answer(text) != answer:
            dropped["whose answer is not the English one"] += 1
        else:
            kept.append({"query": question, "response": english, "lang": language})
    if aligned < LEAST_ALIGNED * translations:
        raise InputError(
            f"{place}: only {aligned} of {translations} translated solutions end in the answer of the English row "
            "before them: the rows are not in the published order"
        )
    return kept, dropped


def question_pairs(rows: Iterable[dict[str, str]], language: Language) -> Iterator[tuple[str, str]]:
    """(question in `language`, English question) of `translated_questions`' rows, each question on one line."""
    english = ""
    for row in rows:
        if row["lang"] == "English":
            english = sources.one_line(row["query"])
        elif row["lang"] == language.name:
            yield sources.one_line(row["query"]), english


class _LettersOnly(dict[int, int | None]):
    """For `str.translate`: letters, marks and digits stay."""

    def __missing__(self, code: int) -> int | None:
        self[code] = code if unicodedata.category(chr(code))[0] in "LMN" else None
        return self[code]


_LETTERS_ONLY = _LettersOnly()


def sentence_key(text: str) -> str:
    """What two spellings of one sentence share: letters, marks and digits, in one case and one Unicode form."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS_ONLY)


def evaluation_keys(folder: Path, name: str, languages: Iterable[Language]) -> set[str]:
    """The keys of a task's questions in `folder`; of XNLI each sentence, and premise and hypothesis together."""
    if name == "xnli":
        rows = [(sentence_key(r["sentence1"]), sentence_key(r["sentence2"])) for r in read_json(folder / _XNLI_TEST)]
        return {key for one, two in rows for key in (one, two, one + two)}
    files = _EVALUATION_FILES[name]
    return {
        sentence_key(files.question(line))
        for language in languages
        for line in (folder / files.path.format(language)).read_text(encoding="utf-8").split("\n")
        if line
    }


def clean(rows: Iterable[Row], key: Callable[[Row], str], questions: set[str]) -> tuple[list[Row], Counter[str]]:
    """The rows that are no evaluation question and came only once, and how many were left out for which reason."""
    kept, seen, dropped = [], set(), Counter()
    for row in rows:
        mine = key(row)
        if mine in questions:
            dropped["evaluation question(s)"] += 1
        elif mine in seen:
            dropped["duplicate(s)"] += 1
        else:
            seen.add(mine)
            kept.append(row)
    return kept, dropped


def clean_pairs(
    pairs: Iterable[tuple[str, str]], questions: set[str], limit: int
) -> tuple[list[tuple[str, str]], Counter[str]]:
    """The first `limit` pairs of sensible length, neither side an evaluation question or seen before."""
    kept, dropped = [], Counter()
    seen: tuple[set[str], set[str]] = set(), set()
    for pair in pairs:
        keys = tuple(sentence_key(side) for side in pair)
        shorter, longer = sorted(len(side) for side in pair)
        if shorter < SHORTEST or longer > LONGEST or longer > RATIO * shorter or not all(keys):
            dropped["of unlikely length"] += 1
        elif keys[0] == keys[1]:
            dropped["not translated"] += 1
        elif not questions.isdisjoint(keys):
            dropped["evaluation question(s)"] += 1
        elif any(mine in side for mine, side in zip(keys, seen, strict=True)):
            dropped["duplicate(s)"] += 1
        else:
            for mine, side in zip(keys, seen, strict=True):
                side.add(mine)
            kept.append(pair)
            if len(kept) == limit:
                break
    return kept, dropped


def _xnli_rows(
    read: Callable[..., Reading], name: str, languages: tuple[Language, ...]
) -> tuple[list[Reading], list[dict[str, str]]]:
    readings = [read(SOURCES[name], language) for language in languages]
    rows = itertools.chain.from_iterable(
        converted(reading, functools.partial(sources.xnli, language=language))
        for reading, language in zip(readings, languages, strict=True)
    )
    return readings, list(rows)


def _lines(rows: Iterable[str | dict[str, Any]]) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _json_list(rows: list[dict[str, Any]]) -> str:
    # A row a line, so that a person can look at them.
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def main() -> None:
    """Parse the command line and build."""
    prepare(parse_flags(PrepareDataFlags))


if __name__ == "__main__":
    exit_with_message(main)

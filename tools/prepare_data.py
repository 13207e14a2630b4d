"""Construction of the `datas` layout of all tasks from public sources: `python -m tools.prepare_data`"""

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, sha256, write_json, write_text
from mindmerger.config import require_positive
from mindmerger.data import MANIFEST, Example, read_evaluation, read_training
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, TRAINING_TASKS, Language, Task, find_task, select_languages
from mindmerger.tasks.answers import parse_answer
from tools import sources
from tools.sources import SOURCES, Reading, pairs_source

# --train_num of the published augmentation stage, the largest number of rows that is read in a language.
MATH_ROWS = 30_000
# Maximum characters of a sentence, and maximum ratio of the lengths of a translation (Chinese to English: about 3).
SHORTEST, LONGEST, RATIO = 3, 500, 6
# Least fraction of translated solutions with the English answer; below it, the rows are not in the assumed order.
LEAST_ALIGNED = 0.9

_EVALUATIONS = {"math": ("mgsm", "msvamp"), "x-csqa": ("x-csqa",), "xnli": ("xnli",)}
# Path in the layout for a language, and source; XNLI has all languages in one file.
_EVALUATION_FILES = {
    "mgsm": ("evaluation/mgsm/mgsm_{0.code}.tsv", "mgsm"),
    "msvamp": ("evaluation/msvamp/test_{0.name}.jsonl", "msvamp"),
    "x-csqa": ("evaluation/x-csqa/{0.code}/dev.jsonl", "x_csqa_dev"),
}
_XNLI_TEST = "evaluation/xnli/test.json"
Row = dict[str, Any]


@dataclass
class PrepareDataFlags:
    """Build the data layout of training and evaluation from public sources."""

    output_dir: str = flag("./datas", "folder to build; unchanged files that its manifest.json lists are kept")
    task: str = flag(",".join(TRAINING_TASKS), "comma-separated: math, x-csqa, xnli")
    languages: str | None = flag(None, "comma-separated English names or ISO codes; default: all of the tasks'")
    pairs: Literal["corpora", "questions"] = flag(
        "corpora",
        "corpora: sentence pairs of OPUS-100 and NLLB; questions: GSM8K's questions and their translations, for small "
        "runs on real models",
    )
    train_num: int = flag(100_000, "sentence pairs per language")
    source_dir: str | None = flag(None, "local copies, {source_dir}/{dataset id}/...; default: the Hugging Face Hub")
    check_counts: bool = flag(True, "refuse a source whose number of rows is not the published one")

    def __post_init__(self) -> None:
        require_positive(self, "train_num")
        if self.pairs == "questions" and self.task != "math":
            raise InputError(f"--pairs questions are GSM8K's: use --task math, not {self.task}")


class Layout:
    """Output folder and its manifest, which is written after every file."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.files: dict[str, dict[str, Any]] = {}
        if (folder / MANIFEST).exists():
            manifest = read_json(folder / MANIFEST)
            known = manifest.get("settings") if isinstance(manifest, dict) else None
            # Folders from before --pairs existed have those of the corpora.
            if not isinstance(known, dict) or {"pairs": "corpora"} | known != settings:
                raise InputError(f"{folder} was built with other settings: choose another --output_dir, or remove it")
            self.files = manifest["files"]
        elif folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} has files that are not from this command: choose another --output_dir")

    def has(self, *names: str) -> bool:
        """True if these files exist and are unchanged."""
        return all(
            name in self.files
            and (self.folder / name).is_file()
            and sha256(self.folder / name) == self.files[name]["sha256"]
            for name in names
        )

    def write(
        self, readings: list[Reading], texts: dict[str, str], rows: int, dropped: dict[str, int] | None = None
    ) -> None:
        """Write files made from `readings`, each atomically, and then the manifest."""
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


def prepare(flags: PrepareDataFlags) -> None:
    """Build every file of the tasks, evaluation first, since its problems are left out of training.

    Raises:
        InputError: a source cannot be read or is not as published, or the folder has other files.
    """
    tasks = [find_task(name, TRAINING_TASKS) for name in flags.task.split(",")]
    builder = Builder(flags)
    for task in tasks:
        for name in _EVALUATIONS[task.name]:
            builder.build_evaluation(EVALUATION_TASKS[name])
    for task in tasks:
        builder.build_questions(task)
    for task in tasks:
        builder.build_pairs(task)


class Builder:
    """Builder of the files of the chosen languages, which keeps unchanged files in the folder.

    Attributes:
        questions: keys of all evaluation questions so far, which are left out of training files.
    """

    def __init__(self, flags: PrepareDataFlags):
        settings = {name: getattr(flags, name) for name in ("task", "languages", "pairs", "train_num", "source_dir")}
        self.questions: set[str] = set()
        self._flags, self._chosen = flags, select_languages(flags.languages)
        self._layout = Layout(Path(flags.output_dir), settings)
        self._source_dir = None if flags.source_dir is None else Path(flags.source_dir)

    def build_evaluation(self, task: Task) -> None:
        """Build the problems of one evaluation task: a file for each language, or XNLI's single file."""
        languages = self._wanted(*task.languages)
        if task.name == "xnli" and languages and not self._layout.has(_XNLI_TEST):
            readings = [self._read("xnli_test", language) for language in languages]
            rows = list(itertools.chain.from_iterable(readings))
            self._layout.write(readings, {_XNLI_TEST: _json_list(rows)}, len(rows))
        for language in languages if task.name in _EVALUATION_FILES else ():
            name, source = _EVALUATION_FILES[task.name]
            if not self._layout.has(path := name.format(language)):
                rows = list(reading := self._read(source, language))
                self._layout.write([reading], {path: _lines(rows)}, len(rows))
        if languages:
            # Rows that evaluation would refuse are refused here.
            problems = read_evaluation(self._layout.folder, task, languages)
            self.questions |= evaluation_keys(self._layout.folder, task, problems)

    def build_questions(self, task: Task) -> None:
        """Build the file of a task's augmentation stage."""
        english = LANGUAGES["English"]
        if task.name == "math":
            languages = self._wanted(*task.languages, english)
            name, build = "query_translation/math.json", self._math
        elif task.name == "x-csqa":
            # Only the English training questions are published.
            languages = self._wanted(english)
            name, build = f"query_translation/x-csqa/train_{english.code}.jsonl", self._x_csqa
        else:
            # XNLI's dev set, on which the published mappings were trained.
            languages = self._wanted(*EVALUATION_TASKS["xnli"].languages)
            name, build = "query_translation/xnli_dev.json", self._xnli
        if languages:
            if not self._layout.has(name):
                readings, rows, dropped = build(languages)
                text = _json_list(rows) if name.endswith(".json") else _lines(rows)
                self._layout.write(readings, {name: text}, len(rows), dropped)
            list(read_training(self._layout.folder, task, "augmentation", languages, 1))

    def build_pairs(self, task: Task) -> None:
        """Build the sentence pairs of every language: line n of one file translates line n of the other."""
        languages = self._wanted(*task.languages)
        for language in languages:
            names = [f"bilingual_pairs/en-{language.code}/train_100k.{code}" for code in (language.code, "en")]
            if not self._layout.has(*names):
                reading = self._read(pairs_source(language, self._flags.pairs), language)
                found = reading
                if self._flags.pairs == "questions":
                    found = question_pairs(translated_questions(reading)[0], language)
                pairs, dropped = clean_pairs(found, self.questions, self._flags.train_num)
                if not pairs:
                    raise InputError(f"{reading.location}: no sentence pair in {language.name} is left after cleaning")
                texts = {name: _lines(side) for name, side in zip(names, zip(*pairs, strict=True), strict=True)}
                self._layout.write([reading], texts, len(pairs), dropped)
        if languages:
            list(read_training(self._layout.folder, task, "mapping", languages, 1))

    def _wanted(self, *languages: Language) -> tuple[Language, ...]:
        return tuple(language for language in languages if self._chosen is None or language in self._chosen)

    def _read(self, name: str, language: Language) -> Reading:
        return Reading(SOURCES[name], language, self._source_dir, self._flags.check_counts)

    def _math(self, languages: tuple[Language, ...]) -> tuple[list[Reading], list[Row], Counter[str]]:
        """Build GSM8K questions in all languages and MetaMathQA in English, each with its English solution."""
        readings = [self._read("gsm8k_instruct", languages[0])]
        rows, dropped = translated_questions(readings[0])
        if LANGUAGES["English"] in languages:
            readings.append(self._read("metamath", LANGUAGES["English"]))
            rows += readings[-1]
        kept = []
        for language in languages:
            own = (row for row in rows if row["lang"] == language.name)
            own, left_out = clean(own, lambda row: sentence_key(row["query"]), self.questions)
            kept += own[:MATH_ROWS]
            dropped += left_out
        return readings, kept, dropped

    def _x_csqa(self, languages: tuple[Language, ...]) -> tuple[list[Reading], list[Row], Counter[str]]:
        reading = self._read("x_csqa_train", languages[0])
        return [reading], *clean(reading, lambda row: sentence_key(row["question"]["stem"]), self.questions)

    def _xnli(self, languages: tuple[Language, ...]) -> tuple[list[Reading], list[Row], Counter[str]]:
        readings = [self._read("xnli_dev", language) for language in languages]
        rows = itertools.chain.from_iterable(readings)
        return readings, *clean(rows, lambda row: sentence_key(row["sentence1"] + row["sentence2"]), self.questions)


def translated_questions(rows: Iterable[tuple[str, str, str]]) -> tuple[list[Row], Counter[str]]:
    """Pair every translated question with the English solution, if its own ends in the same answer.

    Args:
        rows: (language, question, solution); an English row, then its translations, then the next English one. The
            error names the location of a `Reading`.

    Returns:
        Rows of `{query, response, lang}`, and the number of rows left out for each reason.

    Raises:
        InputError: too few translations have the English answer.
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
        location = rows.location if isinstance(rows, Reading) else "these rows"
        raise InputError(
            f"{location}: only {aligned} of {translations} translated solutions end in the answer of the English row "
            "before them: the rows are not in the published order"
        )
    return kept, dropped


def question_pairs(rows: Iterable[Row], language: Language) -> Iterator[tuple[str, str]]:
    """Pairs (question in `language`, English question) of rows of `translated_questions`, each on one line."""
    english = ""
    for row in rows:
        if row["lang"] == "English":
            english = sources.one_line(row["query"])
        elif row["lang"] == language.name:
            yield sources.one_line(row["query"]), english


class _LettersOnly(dict[int, int | None]):
    """Table for `str.translate` that keeps letters, marks and digits."""

    def __missing__(self, code: int) -> int | None:
        self[code] = code if unicodedata.category(chr(code))[0] in "LMN" else None
        return self[code]


_LETTERS_ONLY = _LettersOnly()


def sentence_key(text: str) -> str:
    """Key shared by spellings of a sentence: its letters, marks and digits, in one case and one Unicode form."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_LETTERS_ONLY)


def evaluation_keys(folder: Path, task: Task, problems: dict[Language, list[Example]]) -> set[str]:
    """Keys of a task's questions in `folder`; for XNLI, of each sentence, and of premise and hypothesis together."""
    if task.name == "xnli":
        rows = [(sentence_key(r["sentence1"]), sentence_key(r["sentence2"])) for r in read_json(folder / _XNLI_TEST)]
        return {key for one, two in rows for key in (one, two, one + two)}
    return {sentence_key(problem.source.query) for rows in problems.values() for problem in rows}


def clean(rows: Iterable[Row], key: Callable[[Row], str], questions: set[str]) -> tuple[list[Row], Counter[str]]:
    """Remove evaluation questions and duplicates from rows; count the rows left out for each reason."""
    kept, seen, dropped = [], set(), Counter()
    for row in rows:
        text = key(row)
        if text in questions:
            dropped["evaluation question(s)"] += 1
        elif text in seen:
            dropped["duplicate(s)"] += 1
        else:
            seen.add(text)
            kept.append(row)
    return kept, dropped


def clean_pairs(
    pairs: Iterable[tuple[str, str]], questions: set[str], limit: int
) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Select the first `limit` pairs of sensible length, without evaluation questions and duplicates on either side."""
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
        elif keys[0] in seen[0] or keys[1] in seen[1]:
            dropped["duplicate(s)"] += 1
        else:
            seen[0].add(keys[0])
            seen[1].add(keys[1])
            kept.append(pair)
            if len(kept) == limit:
                break
    return kept, dropped


def _lines(rows: Iterable[str | Row]) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _json_list(rows: list[Row]) -> str:
    # One row on each line, for readability.
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def main() -> None:
    """Parse the command line and build."""
    prepare(parse_flags(PrepareDataFlags))


if __name__ == "__main__":
    exit_with_message(main)

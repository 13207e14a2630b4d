"""Where the data is published: one table, how its files are read, and how their rows become the layout's rows."""

import fnmatch
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, first_line
from mindmerger.evaluation.answers import parse_answer
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, Language


@dataclass(frozen=True)
class Source:
    """One published data set.

    Attributes:
        dataset: its id on the Hugging Face Hub.
        files: patterns of file names, of which the first that matches anything counts; `{code}`, `{name}`, `{pair}`
            and `{nllb}` stand for a language.
        licence: as the data set's card names it, or its authors do.
        rows: how many each language's files hold, as published; None where only some are read.
        url: of the folder that has the files, where the Hub has none of them.
        revision: commit, or branch whose commit at the time is recorded, of the Hub's repository.
    """

    dataset: str
    files: tuple[str, ...]
    licence: str
    rows: int | None = None
    url: str | None = None
    revision: str = "main"


_X_CSQA = "INK-USC/xcsr"
_XNLI = "facebook/xnli"
_XNLI_COMMIT = "b8dd5d7af51114dbda02c0e3f6133f332186418e"
SOURCES = {
    "mgsm": Source("juletxara/mgsm", ("{code}/test-*.parquet", "mgsm_{code}.tsv"), "cc-by-sa-4.0", 250),
    "msvamp": Source("Mathoctopus/MSVAMP", ("test_{name}.json",), "apache-2.0", 1000),
    "gsm8k_instruct": Source(
        "Mathoctopus/GSM8KInstruct_Parallel", ("MGSM8KInstruct_Parallel.json",), "apache-2.0", 73_559
    ),
    "metamath": Source("meta-math/MetaMathQA", ("MetaMathQA-395K.json",), "mit", 395_000),
    "x_csqa_train": Source(_X_CSQA, ("X-CSQA-{code}/train-*.parquet",), "mit", 8888),
    "x_csqa_dev": Source(_X_CSQA, ("X-CSQA-{code}/validation-*.parquet",), "mit", 1000),
    "xnli_dev": Source(_XNLI, ("{code}/validation-*.parquet",), "cc-by-nc-4.0", 2490, revision=_XNLI_COMMIT),
    "xnli_test": Source(_XNLI, ("{code}/test-*.parquet",), "cc-by-nc-4.0", 5010, revision=_XNLI_COMMIT),
    "opus": Source("Helsinki-NLP/opus-100", ("{pair}/train-*.parquet",), "unknown"),
    "nllb": Source(
        "allenai/nllb",
        ("{nllb}.gz",),
        "odc-by",
        url="https://storage.googleapis.com/allennlp-data-bucket/nllb",
    ),
}
# Not in OPUS-100.
_NLLB_LANGUAGES = ("sw",)
_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".tsv": "text", ".gz": "text"}


def pairs_source(language: Language) -> Source:
    """Where sentence pairs of English and `language` come from."""
    return SOURCES["nllb" if language.code in _NLLB_LANGUAGES else "opus"]


class Reading:
    """The rows of one source in one language, read as they are iterated over, from the Hub or from local files.

    Args:
        source: from the table.
        language: None for a source that has all in one file.
        source_dir: holds `{dataset id}/{files}`, to be read in place of the Hub.
        check_count: whether another number of rows than the published one is an error.

    Raises:
        InputError: here, no such files, or no hub; while iterating, a broken connection or file, or the count.
    """

    def __init__(self, source: Source, language: Language | None, source_dir: Path | None, check_count: bool = True):
        self.source = source
        self.check_count = check_count
        self.rows = 0
        root, self.revision, names = _repository(source.dataset, source.revision, source.url, source_dir)
        patterns = [pattern.format(**_words(source, language)) for pattern in source.files]
        matches = [fnmatch.filter(names, pattern) for pattern in patterns] if names is not None else [patterns]
        self.files = sorted(next((found for found in matches if found), []))
        if not self.files:
            raise InputError(f"{root} has no file {' or '.join(patterns)}: is it a download of {source.dataset}?")
        self._paths = [f"{root}/{name}" for name in self.files]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Seconds to import.
        from datasets import disable_progress_bars, load_dataset

        disable_progress_bars()
        builder = _BUILDERS[Path(self.files[0]).suffix]
        try:
            for row in load_dataset(builder, data_files=self._paths, split="train", streaming=True):
                self.rows += 1
                yield row
        # Whatever a connection, a disk or a file format has to say, this source cannot be read.
        except Exception as error:
            raise InputError(f"{self.place}: cannot be read: {first_line(error)}") from error
        if self.check_count and self.source.rows not in (None, self.rows):
            raise InputError(
                f"{', '.join(self._paths)}: {self.rows} rows, but {self.source.rows} are published: the download is "
                "not whole, or the data has changed (--check_counts False takes it as it is)"
            )

    @property
    def place(self) -> str:
        """The row read last, for messages."""
        return f"{self._paths[0]}, row {self.rows}"

    def record(self) -> dict[str, Any]:
        """What the manifest says of this source."""
        return {
            "dataset": self.source.dataset,
            "revision": self.revision,
            "files": self.files,
            "licence": self.source.licence,
            "rows_read": self.rows,
        }


def _words(source: Source, language: Language | None) -> dict[str, str]:
    if language is None:
        return {}
    # X-CSQA's own code for Japanese.
    code = "jap" if source.dataset == _X_CSQA and language.code == "ja" else language.code
    english = LANGUAGES["English"]
    return {
        "code": code,
        "name": language.name,
        "pair": "-".join(sorted((language.code, english.code))),
        "nllb": "-".join(sorted((language.nllb, english.nllb))),
    }


@functools.cache
def _repository(
    dataset: str, revision: str, url: str | None, source_dir: Path | None
) -> tuple[str, str | None, tuple[str, ...] | None]:
    """(root of the files, commit, names of all files); no names where only a URL is known."""
    if source_dir is not None:
        folder = source_dir / dataset
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder: --source_dir has a folder for each data set (hf download {dataset} "
                f"--repo-type dataset --local-dir {folder})"
            )
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return str(folder), None, tuple(sorted(names))
    if url is not None:
        return url, None, None
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(dataset, revision=revision)
    except Exception as error:
        raise InputError(
            f"{dataset} cannot be found on the Hub: {first_line(error)} (--source_dir reads local copies)"
        ) from error
    return f"hf://datasets/{dataset}@{info.sha}", info.sha, tuple(sibling.rfilename for sibling in info.siblings)


def mgsm(row: dict[str, Any]) -> str:
    """MGSM, as a line of the published TSV or a row of the converted set, to `question<TAB>answer`."""
    question, answer = row["text"].split("\t") if "text" in row else (row["question"], row["answer_number"])
    return f"{one_line(question)}\t{str(answer).strip()}"


def msvamp(row: dict[str, Any]) -> dict[str, str]:
    """MSVAMP to `{m_query, response}`."""
    return {"m_query": row["m_query"].strip(), "response": str(row["response"])}


def x_csqa(row: dict[str, Any]) -> dict[str, Any]:
    """X-CSQA to `{answerKey, question: {stem, choices: [{label, text}, ...]}}`."""
    choices = row["question"]["choices"]
    if isinstance(choices, dict):
        # How `datasets` gives a sequence of structs: a struct of lists.
        choices = [
            {"label": label, "text": text} for label, text in zip(choices["label"], choices["text"], strict=True)
        ]
    choices = [{"label": choice["label"], "text": choice["text"].strip()} for choice in choices]
    return {"answerKey": row["answerKey"], "question": {"stem": row["question"]["stem"].strip(), "choices": choices}}


def xnli(row: dict[str, Any], language: Language) -> dict[str, str]:
    """XNLI to `{sentence1, sentence2, label, language}`; labels are numbered as the Hub's copy does."""
    label = EVALUATION_TASKS["xnli"].labels[row["label"]]
    texts = {"sentence1": row["premise"].strip(), "sentence2": row["hypothesis"].strip()}
    return texts | {"label": label, "language": language.name}


def metamath(row: dict[str, Any]) -> dict[str, str]:
    """MetaMathQA to `{query, response, lang}`."""
    return {"query": row["query"].strip(), "response": row["response"].strip(), "lang": "English"}


def gsm8k_instruct(row: dict[str, Any]) -> tuple[str, str, str]:
    """GSM8KInstruct's `{prompt, chosen}` to (language's name, question, solution)."""
    language = re.search(r"(?:request|answer) in (\w+)", row["prompt"])[1]
    question = re.search(r"### Instruction:\n(.*?)\n\n### Response:", row["prompt"], flags=re.DOTALL)[1]
    return language, question.strip(), row["chosen"].strip()


def solution(text: str) -> str | None:
    """A GSM8K solution in MetaMath's form: no `<<...>>` marks, `The answer is: N` at the end; None without a number."""
    answer = parse_answer(text)
    if answer is None:
        return None
    steps = re.sub(r"<<[^<>]*>>", "", text).partition("####")[0].strip()
    return f"{steps}\nThe answer is: {answer.numerator if answer.denominator == 1 else float(answer)}"


def sentence_pair(row: dict[str, Any], language: Language) -> tuple[str, str]:
    """A row of OPUS-100, or a line of NLLB (`sentence<TAB>sentence<TAB>score...`), to (sentence, English sentence)."""
    if "translation" in row:
        source, target = row["translation"][language.code], row["translation"]["en"]
    else:
        first, second, *_ = row["text"].split("\t")
        source, target = (second, first) if LANGUAGES["English"].nllb < language.nllb else (first, second)
    return one_line(source), one_line(target)


def one_line(text: str) -> str:
    """`text` without tabs and line breaks, which separate the fields and rows of a file."""
    return re.sub(r"[\t\r\n]+", " ", text).strip()

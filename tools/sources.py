"""Table of the published data sets, readers of their files, and conversions of their rows to the layout."""

import fnmatch
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, first_line
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES, Language
from mindmerger.tasks.answers import parse_answer


@dataclass(frozen=True)
class Source:
    """One published data set.

    Attributes:
        dataset: id on the Hugging Face Hub.
        files: patterns of file names, of which the first with a match is used; `{code}`, `{name}`, `{pair}` and
            `{nllb}` stand for a language.
        licence: licence by the data set's card or its authors.
        convert: function from a row and its language to a row of the layout.
        rows: published number of rows of each language; None if only some are read.
        url: URL of the folder of the files, if the Hub does not have them.
        revision: commit of the Hub's repository, or branch, whose current commit is recorded.
    """

    dataset: str
    files: tuple[str, ...]
    licence: str
    convert: Callable[[dict[str, Any], Language], Any]
    rows: int | None = None
    url: str | None = None
    revision: str = "main"


_X_CSQA = "INK-USC/xcsr"
_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".tsv": "text", ".gz": "text"}


class Reading:
    """Rows of one source in one language, converted to the layout and read lazily.

    Args:
        source: source from the table.
        language: language of the rows, if the source has a file for each.
        source_dir: folder of `{dataset id}/{files}` to read instead of the Hub.
        check_count: True to raise an error if the number of rows is not the published one.

    Raises:
        InputError: there are no such files, or no Hub; during iteration, a file or the number of rows is wrong.
    """

    def __init__(self, source: Source, language: Language, source_dir: Path | None, check_count: bool = True):
        self.source = source
        self._language = language
        self.check_count = check_count
        self.rows = 0
        root, self.revision, names = _repository(source.dataset, source.revision, source.url, source_dir)
        patterns = [pattern.format(**_words(source, language)) for pattern in source.files]
        matches = [fnmatch.filter(names, pattern) for pattern in patterns] if names is not None else [patterns]
        self.files = sorted(next((found for found in matches if found), []))
        if not self.files:
            raise InputError(f"{root} has no file {' or '.join(patterns)}: is it a download of {source.dataset}?")
        self._paths = [f"{root}/{name}" for name in self.files]

    def __iter__(self) -> Iterator[Any]:
        # Imported here, since it takes seconds.
        from datasets import disable_progress_bars, load_dataset

        disable_progress_bars()
        builder = _BUILDERS[Path(self.files[0]).suffix]
        self.rows = 0
        try:
            for row in load_dataset(builder, data_files=self._paths, split="train", streaming=True):
                self.rows += 1
                yield self._converted(row)
        except InputError:
            raise
        # Connections, disks and file formats raise errors of many types.
        except Exception as error:
            raise InputError(f"{self.location}: cannot be read: {first_line(error)}") from error
        if self.check_count and self.source.rows not in (None, self.rows):
            raise InputError(
                f"{', '.join(self._paths)}: {self.rows} rows, but {self.source.rows} are published: the download is "
                "incomplete, or the data has changed (--check_counts False accepts it)"
            )

    def _converted(self, row: dict[str, Any]) -> Any:
        try:
            return self.source.convert(row, self._language)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{self.location}: not the published schema of {self.source.dataset}: "
                f"{type(error).__name__}: {error}; its columns are {', '.join(row)}"
            ) from error

    @property
    def location(self) -> str:
        """File and number of the last row read."""
        return f"{self._paths[0]}, row {self.rows}"

    def record(self) -> dict[str, Any]:
        """Entry of this source in the manifest."""
        return {
            "dataset": self.source.dataset,
            "revision": self.revision,
            "files": self.files,
            "licence": self.source.licence,
            "rows_read": self.rows,
        }


def _words(source: Source, language: Language) -> dict[str, str]:
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
    """Root of the files, commit, and names of all files; no names for a URL."""
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


def mgsm(row: dict[str, Any], _: Language) -> str:
    """Convert MGSM, a line of the published TSV or a row of the Hub's copy, to `question<TAB>answer`."""
    question, answer = row["text"].split("\t") if "text" in row else (row["question"], row["answer_number"])
    return f"{one_line(question)}\t{str(answer).strip()}"


def msvamp(row: dict[str, Any], _: Language) -> dict[str, str]:
    """Convert MSVAMP to `{m_query, response}`."""
    return {"m_query": row["m_query"].strip(), "response": str(row["response"])}


def x_csqa(row: dict[str, Any], _: Language) -> dict[str, Any]:
    """Convert X-CSQA to `{answerKey, question: {stem, choices: [{label, text}, ...]}}`."""
    choices = row["question"]["choices"]
    if isinstance(choices, dict):
        # `datasets` returns a sequence of structs as a struct of lists.
        choices = [
            {"label": label, "text": text} for label, text in zip(choices["label"], choices["text"], strict=True)
        ]
    choices = [{"label": choice["label"], "text": choice["text"].strip()} for choice in choices]
    return {"answerKey": row["answerKey"], "question": {"stem": row["question"]["stem"].strip(), "choices": choices}}


def xnli(row: dict[str, Any], language: Language) -> dict[str, str]:
    """Convert XNLI to `{sentence1, sentence2, label, language}`; labels have the numbers of the Hub's copy."""
    label = EVALUATION_TASKS["xnli"].labels[row["label"]]
    texts = {"sentence1": row["premise"].strip(), "sentence2": row["hypothesis"].strip()}
    return texts | {"label": label, "language": language.name}


def metamath(row: dict[str, Any], _: Language) -> dict[str, str]:
    """Convert MetaMathQA to `{query, response, lang}`."""
    return {"query": row["query"].strip(), "response": row["response"].strip(), "lang": "English"}


def gsm8k_instruct(row: dict[str, Any], _: Language) -> tuple[str, str, str]:
    """Convert GSM8KInstruct's `{prompt, chosen}` to (name of the language, question, solution)."""
    language = re.search(r"(?:request|answer) in (\w+)", row["prompt"])[1]
    question = re.search(r"### Instruction:\n(.*?)\n\n### Response:", row["prompt"], flags=re.DOTALL)[1]
    return language, question.strip(), row["chosen"].strip()


def solution(text: str) -> str | None:
    """Convert a GSM8K solution to MetaMath's form, without `<<...>>` and with `The answer is: N`; None if no number."""
    answer = parse_answer(text)
    if answer is None:
        return None
    steps = re.sub(r"<<[^<>]*>>", "", text).partition("####")[0].strip()
    return f"{steps}\nThe answer is: {answer.numerator if answer.denominator == 1 else float(answer)}"


def sentence_pair(row: dict[str, Any], language: Language) -> tuple[str, str]:
    """Convert a row of OPUS-100, or a line of NLLB (`sentence<TAB>sentence<TAB>score...`), to (sentence, English)."""
    if "translation" in row:
        source, target = row["translation"][language.code], row["translation"]["en"]
    else:
        first, second, *_ = row["text"].split("\t")
        source, target = (second, first) if LANGUAGES["English"].nllb < language.nllb else (first, second)
    return one_line(source), one_line(target)


def one_line(text: str) -> str:
    """Replace tabs and line breaks, which separate the fields and rows of a file."""
    return re.sub(r"[\t\r\n]+", " ", text).strip()


_XNLI = "facebook/xnli"
_XNLI_COMMIT = "b8dd5d7af51114dbda02c0e3f6133f332186418e"
_NLLB = "https://storage.googleapis.com/allennlp-data-bucket/nllb"
_PARALLEL = "Mathoctopus/GSM8KInstruct_Parallel"
SOURCES = {
    "mgsm": Source("juletxara/mgsm", ("{code}/test-*.parquet", "mgsm_{code}.tsv"), "cc-by-sa-4.0", mgsm, 250),
    "msvamp": Source("Mathoctopus/MSVAMP", ("test_{name}.json",), "apache-2.0", msvamp, 1000),
    "gsm8k_instruct": Source(_PARALLEL, ("MGSM8KInstruct_Parallel.json",), "apache-2.0", gsm8k_instruct, 73_559),
    "metamath": Source("meta-math/MetaMathQA", ("MetaMathQA-395K.json",), "mit", metamath, 395_000),
    "x_csqa_train": Source(_X_CSQA, ("X-CSQA-{code}/train-*.parquet",), "mit", x_csqa, 8888),
    "x_csqa_dev": Source(_X_CSQA, ("X-CSQA-{code}/validation-*.parquet",), "mit", x_csqa, 1000),
    "xnli_dev": Source(_XNLI, ("{code}/validation-*.parquet",), "cc-by-nc-4.0", xnli, 2490, revision=_XNLI_COMMIT),
    "xnli_test": Source(_XNLI, ("{code}/test-*.parquet",), "cc-by-nc-4.0", xnli, 5010, revision=_XNLI_COMMIT),
    "opus": Source("Helsinki-NLP/opus-100", ("{pair}/train-*.parquet",), "unknown", sentence_pair),
    "nllb": Source("allenai/nllb", ("{nllb}.gz",), "odc-by", sentence_pair, url=_NLLB),
}


def pairs_source(language: Language, kind: str) -> str:
    """Name of the source of sentence pairs of English and `language`; `kind` as in `--pairs`."""
    if kind == "questions":
        return "gsm8k_instruct"
    # OPUS-100 has no Swahili.
    return "nllb" if language.code == "sw" else "opus"

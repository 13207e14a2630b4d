"""Real texts of two generally available domains: math problems with solutions, Python functions with docstrings.

Each has a part that is read (a question; a signature with its docstring) and a part that is learned (the solution; the
body), as in GSM8K and HumanEval.
"""

import ast
import json
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.io import read_json, write_text

# Python's own library and packages that requirements.txt pins; the functions of the second line are held out.
TRAINING_PACKAGES = ("stdlib", "numpy", "matplotlib")
HELD_OUT_PACKAGES = ("accelerate", "datasets", "psutil", "tensorboard", "tqdm")
# Tests, packages of others, and unrelated programs.
_SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "site-packages", "dist-packages"}

_LAST_STEP = re.compile(r"(.*=[ $]*)(\d+)((?!\d|[.,/]\d)[^\n=]*\n)The answer is: \2", re.DOTALL)
_INTEGER = re.compile(r"(?<![\d.,/])\d+(?![\d/]|[.,]\d)")


class Text(NamedTuple):
    """Part of a text that is read, and the part that is learned; together they are the whole text."""

    read: str
    learned: str


def write_jsonl(path: Path, texts: Iterable[Text]) -> None:
    """Write texts in the form that `compute_gram.py` reads."""
    write_text(path, "".join(json.dumps({"text": text.read + text.learned}) + "\n" for text in texts))


class Choices(NamedTuple):
    """Right and wrong results of a problem's last step.

    Attributes:
        shown: the part of `Text.learned` before the result.
        endings: the right one, then three wrong ones, each to the end of the line.
    """

    shown: str
    endings: tuple[str, str, str, str]


def problems(math_data: Path, language: str = "English") -> list[Text]:
    """Read every problem with its question in one language once, in the file's order.

    Args:
        math_data: MindMerger's `math.json`, a list of {query, response, lang}; all responses are English.

    Raises:
        InputError: it is no such list, or has no question in the language.
    """
    rows = read_json(math_data)
    try:
        solutions = {row["query"]: row["response"] for row in rows if row["lang"] == language}
    except (TypeError, KeyError) as error:
        raise InputError(f"{math_data}: not a list of {{query, response, lang}}") from error
    if not solutions:
        raise InputError(f"{math_data}: no row has the lang {language}")
    return [Text(f"Question: {query}\nAnswer:", f" {response.strip()}") for query, response in solutions.items()]


def choices(problem: Text) -> Choices | None:
    """Choices for the result of a problem; None if its solution does not end in an equation of the answer.

    The text up to the last `=` is shown, so that one step of arithmetic is left: without that step a small model would
    guess, and with the result it would only copy. Wrong results are other numbers of problem and solution, in an order
    seeded by the problem's text, and if these are too few, neighbours of the right one.
    """
    match = _LAST_STEP.fullmatch(problem.learned)
    if match is None:
        return None
    shown, right, rest = match.groups()
    others = sorted(set(_INTEGER.findall(problem.read + problem.learned)) - {right})
    random.Random(problem.read).shuffle(others)
    near = [str(int(right) + step) for step in (1, 2, 10)]
    wrong = list(dict.fromkeys([*others, *near]))[:3]
    return Choices(shown, tuple(number + rest for number in (right, *wrong)))


def functions(packages: Iterable[str]) -> list[Text]:
    """Functions and methods with a docstring and a body, as written except for their indentation.

    Args:
        packages: names of installed packages; `stdlib` is Python's own library.

    Returns:
        Each body once, in order of package, file and line.
    """
    bodies: dict[str, Text] = {}
    for package in packages:
        for path in _sources(package):
            for text in _functions_of(path.read_text(encoding="utf-8", errors="replace")):
                bodies.setdefault(text.learned, text)
    return list(bodies.values())


def _sources(package: str) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    if package != "stdlib":
        root = Path(sysconfig.get_path("purelib")) / package
        if not root.is_dir():
            raise InputError(f"the package {package} is not installed: pip install -r requirements.txt")
    return sorted(path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))


def _functions_of(source: str) -> Iterator[Text]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, and tests of the parser itself
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
            continue
        docstring, *body = node.body
        if not body or body[0].lineno <= docstring.end_lineno:
            continue
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).splitlines()
        cut = docstring.end_lineno - node.lineno + 1
        # The body includes the line break before it: tokenizers encode a break with following text differently.
        yield Text("\n".join(text[:cut]), "\n" + "\n".join(text[cut:]))

"""Real texts of two domains that anyone has: math problems with solutions, Python functions with docstrings.

Each has a part that is read (a question; a signature with its docstring) and a part that is learned (the solution; the
body), as in GSM8K and HumanEval.
"""

import ast
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from common.errors import InputError
from common.files import read_json

# Python's own library and packages that requirements.txt pins; the functions of the second line are never learned from.
TRAINING_PACKAGES = ("stdlib", "numpy", "matplotlib")
HELD_OUT_PACKAGES = ("accelerate", "datasets", "psutil", "tensorboard", "tqdm")
# Tests, other people's packages, and programs that only happen to lie there.
_SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "site-packages", "dist-packages"}

_ANSWER = "The answer is:"
_INTEGER = re.compile(r"(?<![\d.,/])\d+(?![\d/]|[.,]\d)")


class Text(NamedTuple):
    """What a model reads, and what it is to say then; together a text as it is written."""

    read: str
    learned: str


class Choices(NamedTuple):
    """The end of a problem's solution, to be told from wrong ones.

    Attributes:
        shown: the part of `Text.learned` that stands before each of them.
        endings: the right one, then three wrong ones.
    """

    shown: str
    endings: tuple[str, str, str, str]


def problems(math_data: Path) -> list[Text]:
    """Every English problem once, in the file's order.

    Args:
        math_data: MindMerger's `math.json`, a list of {query, response, lang}.

    Raises:
        InputError: it is no such list, or has no English.
    """
    rows = read_json(math_data)
    try:
        solutions = {row["query"]: row["response"] for row in rows if row["lang"] == "English"}
    except (TypeError, KeyError) as error:
        raise InputError(f"{math_data}: not a list of {{query, response, lang}}") from error
    if not solutions:
        raise InputError(f"{math_data}: no row has the lang English")
    return [Text(f"Question: {query}\nAnswer:", f" {response.strip()}") for query, response in solutions.items()]


def choices(problem: Text) -> Choices | None:
    """What is asked by forced choice of a problem; None where its solution does not end in an integer.

    All of the solution but its last step is shown: then the number that is asked for has not been said, and one step of
    arithmetic finds it. Wrong endings have the other numbers of the problem and of its solution, in an order drawn by
    the problem's own text, and where these are too few, neighbours of the right one.
    """
    match = re.fullmatch(rf"(.*?)([^\n]*\n){re.escape(_ANSWER)} (\d+)", problem.learned, re.DOTALL)
    if match is None:
        return None
    shown, right = match[1], match[3]
    numbers = _INTEGER.findall(problem.read + problem.learned)
    others = sorted(set(numbers) - {right})
    random.Random(problem.read).shuffle(others)
    near = [str(int(right) + step) for step in (1, 2, 10)]
    wrong = list(dict.fromkeys([*others, *near]))[:3]
    opening = _ANSWER if shown else f" {_ANSWER}"
    return Choices(shown, tuple(f"{opening} {number}" for number in (right, *wrong)))


def functions(packages: Iterable[str]) -> list[Text]:
    """Functions and methods with a docstring and a body, as they are written but for their indentation.

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
        # The body brings the line break before it: tokenizers tell a break with what follows from one with nothing.
        yield Text("\n".join(text[:cut]), "\n" + "\n".join(text[cut:]))

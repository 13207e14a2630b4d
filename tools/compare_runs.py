"""Comparison of several evaluations: one self-contained HTML page, and a Markdown table."""

import html
import io
import itertools
import json
import math
import string
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, write_text
from common.runs import RUN
from mindmerger.evaluation.metrics import score
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES

# Okabe and Ito's palette, which colour-blind readers can distinguish.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_NEEDED = {"problem": int, "language": str, "question": str, "gold": str, "output": str}
_NEEDED |= {"right": bool, "stopped": bool, "cut": list}
_TEMPLATE = Path(__file__).with_name("comparison.html")
# Language, question, gold answer, and number among equal ones.
Key = tuple[str, str, str, int]
Answers = dict[Key, dict[str, Any]]


@dataclass
class ReportFlags:
    """Compare evaluations, problem by problem: `python -m tools.compare_runs results/A results/B ...`"""

    results: list[str] = flag([], "output folders of run_evaluation.py; the others are compared with the first")
    training: list[str] = flag([], "output folders of run_training.py, for their learning curves")
    out: str = flag("comparison.html", "page to write; the table is written to a .md file beside it")

    def __post_init__(self) -> None:
        if len(self.results) < 2:
            raise InputError("name two or more folders of results to compare: results/A results/B")
        if len(self.results) > len(COLOURS):
            raise InputError(f"at most {len(COLOURS)} folders of results fit on one page")
        if Path(self.out).suffix != ".html":
            raise InputError(f"--out {self.out} must end in .html")


@dataclass(frozen=True)
class Run:
    """One folder of results.

    Attributes:
        name: name on the page.
        tasks: graded answers of each task, by problem.
    """

    name: str
    tasks: dict[str, Answers]


def parse_comparison(words: list[str]) -> ReportFlags:
    """Parse a command line that begins with folders of results."""
    return parse_flags(ReportFlags, words if not words or words[0].startswith("-") else ["--results", *words])


def write_comparison(flags: ReportFlags) -> str:
    """Write the page and the Markdown file; return the Markdown and a line with both names.

    Raises:
        InputError: a folder has no finished results or metrics, or the runs have no task in common.
    """
    runs = read_runs([Path(folder) for folder in flags.results])
    tasks = [name for name in EVALUATION_TASKS if all(name in run.tasks for run in runs)]
    if not tasks:
        raise InputError(f"{', '.join(flags.results)} have no task in common")
    curves = {folder: read_metrics(Path(folder)) for folder in flags.training}
    markdown = "\n".join(markdown_table(task, runs) for task in tasks)
    out = Path(flags.out)
    write_text(out, page(tasks, runs, curves))
    write_text(out.with_suffix(".md"), markdown)
    return f"{markdown}\n{out} and {out.with_suffix('.md')} are written"


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: the p-value of the discordant pairs under a fair coin (McNemar 1947).

    Args:
        only_first, only_second: numbers of problems that only the first or only the second run solved.
    """
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**count)


class Paired(NamedTuple):
    """Two runs in one language: numbers of common problems, and of those that only one run solved."""

    count: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Accuracy of the second run minus that of the first, from -1 to 1."""
        return (self.only_second - self.only_first) / self.count

    @property
    def p_value(self) -> float:
        """The p-value of `mcnemar`."""
        return mcnemar(self.only_first, self.only_second)


def pair(first: Answers, second: Answers) -> dict[str, Paired]:
    """Compare two runs on their common problems, by language."""
    counts: dict[str, Counter[tuple[bool, bool]]] = {}
    for key in first.keys() & second.keys():
        counts.setdefault(key[0], Counter())[first[key]["right"], second[key]["right"]] += 1
    return {
        language: Paired(outcomes.total(), outcomes[True, False], outcomes[False, True])
        for language, outcomes in counts.items()
    }


def read_runs(folders: list[Path]) -> list[Run]:
    """Read runs from their folders, or from the folder of a single task.

    Raises:
        InputError: a folder has no finished results, or a line is not a graded answer.
    """
    runs = []
    for folder in folders:
        alone = (folder / "predictions").is_dir()
        tasks = [folder] if alone else [path.parent for path in sorted(folder.glob("*/predictions"))]
        tasks = [task for task in tasks if not (task / RUN).exists() or "result" in read_json(task / RUN)]
        if not tasks:
            raise InputError(f"{folder}: no predictions/ of a finished evaluation in it or in its task folders")
        name = folder.resolve().parent.name if alone else folder.resolve().name
        runs.append(Run(name, {task.name: read_answers(task) for task in tasks}))
    names = Counter(run.name for run in runs)
    return [
        run if names[run.name] == 1 else replace(run, name=str(folder))
        for run, folder in zip(runs, folders, strict=True)
    ]


def read_answers(folder: Path) -> Answers:
    """Read the graded answers in `folder/predictions/*.jsonl` by problem, languages in the order of the files."""
    answers: Answers = {}
    times: Counter[tuple[str, str, str]] = Counter()
    records: list[tuple[str, int, dict[str, Any]]] = []
    for path in sorted((folder / "predictions").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
            try:
                record = json.loads(line)
                wrong = [name for name, kind in _NEEDED.items() if not isinstance(record[name], kind)]
                wrong += ["language"] if record["language"] not in LANGUAGES else []
                wrong += ["parsed"] if "parsed" not in record else []
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: not a graded answer of run_evaluation.py") from error
            if wrong:
                raise InputError(f"{path}, line {number}: {', '.join(wrong)} is not as written by run_evaluation.py")
            # Each rank has a file of a language's answers, in the order in which they ended.
            records.append((path.name.split(".")[0], record["problem"], record))
    for *_, record in sorted(records, key=lambda located: located[:2]):
        problem = record["language"], record["question"], record["gold"]
        answers[*problem, times[problem]] = record
        times[problem] += 1
    if not answers:
        raise InputError(f"{folder}: no answers in predictions/")
    return answers


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of `folder/metrics.jsonl`.

    Raises:
        InputError: there is no such file, or a line is not a JSON object with a step.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no metrics of run_training.py: {error}") from error
    if not all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
        raise InputError(f"{path}: a line without a step")
    return lines


def markdown_table(task: str, runs: list[Run]) -> str:
    """Format the accuracies of a task and their notes."""
    heads, *rows = accuracies(task, runs)
    rows = [heads, ["---"] * len(heads), *rows]
    # A bar would end the cell.
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([f"## {task}", "", *lines, "", _notes(task, runs), ""])


def accuracies(task: str, runs: list[Run]) -> list[list[str]]:
    """Build the table: a row of heads, one row for each language, and the averages.

    Accuracies have 95% Wilson intervals. Runs after the first also have the difference to it and the test's p.
    """
    scores = [score(task, run.tasks[task].values()) for run in runs]
    paired = [pair(runs[0].tasks[task], run.tasks[task]) for run in runs[1:]]
    rows = [["language", f"{runs[0].name}, %"]]
    for run in runs[1:]:
        rows[0] += [f"{run.name}, %", "difference", "p"]
    for language in _languages(task, runs):
        first, *others = (_interval(scored["languages"].get(language)) for scored in scores)
        row = [language, first]
        for text, pairs in zip(others, paired, strict=True):
            both = pairs.get(language)
            row += [text, *(("", "") if both is None else (f"{100 * both.difference:+.1f}", _p(both.p_value)))]
        rows.append(row)
    for name in ("average", "average_without_english"):
        values = [scored[name] for scored in scores]
        # Averages over different languages are not compared.
        if None not in values and all(scored["languages"].keys() == scores[0]["languages"].keys() for scored in scores):
            row = [name.replace("_", " ").replace("english", "English"), f"{100 * values[0]:.1f}"]
            for value in values[1:]:
                row += [f"{100 * value:.1f}", f"{100 * (value - values[0]):+.1f}", ""]
            rows.append(row)
    return rows


def _interval(entry: dict[str, float] | None) -> str:
    if entry is None:
        return ""
    return f"{100 * entry['accuracy']:.1f} ({100 * entry['low']:.1f}-{100 * entry['high']:.1f})"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _notes(task: str, runs: list[Run]) -> str:
    """Notes that explain the table."""
    first = runs[0].tasks[task].keys()
    in_common = [
        f"{run.name} and {runs[0].name} have {len(first & run.tasks[task].keys())} common problems of "
        f"{len(run.tasks[task])} and {len(first)}; p and the differences by language are computed on these."
        for run in runs[1:]
        if first != run.tasks[task].keys()
    ]
    general = (
        f"In brackets: 95% Wilson interval. Difference in points to {runs[0].name}, p of the exact McNemar test on "
        "the same problems, not corrected for the number of languages. The average is not tested, since the problems "
        "of different languages are translations of each other."
    )
    return " ".join([general, *in_common])


def _languages(task: str, runs: list[Run]) -> list[str]:
    names = {key[0] for run in runs for key in run.tasks[task]}
    return [language.name for language in EVALUATION_TASKS[task].languages if language.name in names]


def page(tasks: list[str], runs: list[Run], curves: dict[str, list[dict[str, Any]]]) -> str:
    """Build the page; texts of models and users are escaped."""
    sections = [_legend(run.name for run in runs), *([_curves(curves)] if curves else [])]
    sections += [_section(task, runs) for task in tasks]
    title = " vs. ".join(run.name for run in runs)
    template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body="\n".join(sections))


def _section(task: str, runs: list[Run]) -> str:
    heads, *rows = accuracies(task, runs)
    notes = html.escape(_notes(task, runs))
    return (
        f'<section><h2>{html.escape(task)}</h2>{_table(heads, rows)}<p class="note">{notes}</p>'
        f"<h3>Where the runs differ</h3>{_differences(task, runs)}</section>"
    )


def _legend(names: Iterable[str]) -> str:
    items = (
        f'<li><span class="swatch" style="background:{colour}"></span> {html.escape(name)}</li>'
        for name, colour in zip(names, itertools.cycle(COLOURS), strict=False)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(head)}</th>" for head in heads)]
    for first, *cells in rows:
        lines.append(f"<th>{html.escape(first)}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="figures">{rows}</table></div>'


def _curves(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Draw training loss and dev perplexity over steps."""
    charts = []
    for name, title in (("loss", "training loss"), ("dev_perplexity", "dev perplexity")):
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure = Figure(figsize=(4.4, 3.2), layout="constrained")
            axes = figure.add_subplot(title=title, xlabel="optimizer step", yscale="log")
            for lines, colour in zip(curves.values(), itertools.cycle(COLOURS), strict=False):
                points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
                marker = "o" if name == "dev_perplexity" else None
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, linewidth=1)
            # 4 instead of 4 x 10^0.
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        charts.append(svg[svg.index("<svg") :])
    return f'<section><h2>Training</h2>{_legend(curves)}<div class="curves">{"".join(charts)}</div></section>'


def _differences(task: str, runs: list[Run]) -> str:
    """List the problems that some runs solved and others did not, with all answers and filters by a script."""
    common = [key for key in runs[0].tasks[task] if all(key in run.tasks[task] for run in runs)]
    order = _languages(task, runs)
    shown = sorted(
        (key for key in common if len({run.tasks[task][key]["right"] for run in runs}) == 2),
        key=lambda key: order.index(key[0]),
    )
    if not shown:
        return f"<p>All runs solved the same of the {len(common)} problems that all of them have.</p>"
    return (
        f'<div class="filters" hidden></div><p>{len(shown)} of the {len(common)} problems that all runs have.</p>'
        f'<div class="problems">{"".join(_problem(task, key, runs) for key in shown)}</div>'
    )


def _problem(task: str, key: Key, runs: list[Run]) -> str:
    language, question, gold, _ = key
    records = [run.tasks[task][key] for run in runs]
    solved = " and ".join(run.name for run, record in zip(runs, records, strict=True) if record["right"])
    marks, answers = "", ""
    for run, record, colour in zip(runs, records, COLOURS, strict=False):
        name, verdict = html.escape(run.name), "right" if record["right"] else "wrong"
        mark = "✓" if record["right"] else "✗"
        marks += f'<span class="{verdict}" style="border-color:{colour}" title="{name}">{mark}</span>'
        more = ("" if record["stopped"] else ", unfinished") + (", cut" if record["cut"] else "")
        output = html.escape(record["output"]) or "<i>nothing</i>"
        answers += f'<dt>{name}: {verdict}{more}</dt><dd dir="auto">{output}</dd>'
    return (
        f'<details data-language="{language}" data-solved="{html.escape(solved)}"><summary>{marks} <b>{language}</b> '
        f'<span class="question" lang="{LANGUAGES[language].code}" dir="auto">{html.escape(question)}</span></summary>'
        f'<dl><dt>Gold answer</dt><dd dir="auto">{html.escape(gold)}</dd>{answers}</dl></details>'
    )


def main() -> None:
    """Parse the command line and write the page."""
    print(write_comparison(parse_comparison(sys.argv[1:])))


if __name__ == "__main__":
    exit_with_message(main)

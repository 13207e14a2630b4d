"""Several evaluations side by side: one HTML page that needs nothing else, and a Markdown table."""

import html
import io
import json
import math
import statistics
import string
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from common.cli import flag, parse_flags
from common.errors import InputError, exit_with_message
from common.io import read_json, write_text
from common.runs import RUN
from mindmerger.evaluation.metrics import score
from mindmerger.tasks import EVALUATION_TASKS, LANGUAGES

# Okabe and Ito's palette, told apart by colour-blind readers as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_NEEDED = {"problem": int, "language": str, "question": str, "gold": str, "output": str}
_NEEDED |= {"right": bool, "stopped": bool, "cut": list}
_TEMPLATE = Path(__file__).with_name("comparison.html")
# language, question, gold answer, and which of several equal ones.
Key = tuple[str, str, str, int]


@dataclass
class ReportFlags:
    """Compare evaluations, problem by problem: `python -m tools.compare_runs results/A results/B ...`"""

    results: list[str] = flag(
        [], "folders that run_evaluation.py wrote; the first one is what the others are tested against"
    )
    training: list[str] = flag([], "folders that run_training.py wrote, for their learning curves")
    out: str = flag("comparison.html", "page to write; the table goes into a .md file beside it")

    def __post_init__(self) -> None:
        if len(self.results) < 2:
            raise InputError("name two or more folders of results to compare: results/A results/B")
        if len(self.results) > len(COLOURS):
            raise InputError(f"at most {len(COLOURS)} folders of results can be told apart on one page")
        if Path(self.out).suffix != ".html":
            raise InputError(f"--out {self.out} must end in .html")


@dataclass(frozen=True)
class Run:
    """One folder of results.

    Attributes:
        name: what the page calls it.
        tasks: the graded answers of each task, by problem.
        settings: of each task, as its `run.json` records them.
    """

    name: str
    tasks: dict[str, dict[Key, dict[str, Any]]]
    settings: dict[str, dict[str, Any]]


def parse_comparison(words: list[str]) -> ReportFlags:
    """What the words of a command line ask for, folders of results first."""
    return parse_flags(ReportFlags, words if not words or words[0].startswith("-") else ["--results", *words])


def write_comparison(flags: ReportFlags) -> str:
    """Write the page and the Markdown file; returns the Markdown, and where it is.

    Raises:
        InputError: a folder without finished results or metrics, or runs that have no task in common.
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
        only_first, only_second: problems that only the one or only the other solved.
    """
    count = only_first + only_second
    tail = sum(math.comb(count, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**count)


@dataclass(frozen=True)
class Paired:
    """Two runs on the problems that both answered, in one language.

    Attributes:
        count: such problems.
        only_first, only_second: those of them that only one of the two solved.
    """

    count: int
    only_first: int
    only_second: int

    @property
    def difference(self) -> float:
        """Accuracy of the second minus that of the first, from -1 to 1."""
        return (self.only_second - self.only_first) / self.count

    @property
    def p_value(self) -> float:
        """Of `mcnemar`."""
        return mcnemar(self.only_first, self.only_second)


def pair(first: dict[Key, dict[str, Any]], second: dict[Key, dict[str, Any]]) -> dict[str, Paired]:
    """Compare two runs' answers to the problems that both have, by language."""
    counts: dict[str, Counter[tuple[bool, bool]]] = {}
    for key in first.keys() & second.keys():
        counts.setdefault(key[0], Counter())[first[key]["right"], second[key]["right"]] += 1
    return {
        language: Paired(outcomes.total(), outcomes[True, False], outcomes[False, True])
        for language, outcomes in counts.items()
    }


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders, each with its tasks, or a task's folder alone.

    Raises:
        InputError: no finished results in one of them, or a line that is no graded answer.
    """
    runs = []
    for folder in folders:
        alone = (folder / "predictions").is_dir()
        places = [folder] if alone else [path.parent for path in sorted(folder.glob("*/predictions"))]
        records = {place: read_json(place / RUN) if (place / RUN).exists() else {"result": {}} for place in places}
        places = [place for place in places if "result" in records[place]]
        if not places:
            raise InputError(f"{folder}: no predictions/ of a finished evaluation in it, nor in a task's folder there")
        name = folder.resolve().parent.name if alone else folder.resolve().name
        settings = {place.name: records[place].get("settings", {}) for place in places}
        runs.append(Run(name, {place.name: read_answers(place) for place in places}, settings))
    names = Counter(run.name for run in runs)
    return [
        run if names[run.name] == 1 else Run(str(folder), run.tasks, run.settings)
        for run, folder in zip(runs, folders, strict=True)
    ]


def read_answers(folder: Path) -> dict[Key, dict[str, Any]]:
    """The graded answers in `folder/predictions/*.jsonl`, files in order, each language by problem."""
    answers: dict[Key, dict[str, Any]] = {}
    times: Counter[tuple[str, str, str]] = Counter()
    records: list[tuple[str, int, dict[str, Any]]] = []
    for path in sorted((folder / "predictions").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
            try:
                record = json.loads(line)
                wrong = [name for name, kind in _NEEDED.items() if not isinstance(record[name], kind)]
                wrong += ["language"] if record["language"] not in LANGUAGES else []
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: not an answer that run_evaluation.py graded") from error
            if wrong or "parsed" not in record:
                raise InputError(
                    f"{path}, line {number}: {', '.join(wrong) or 'parsed'} is not as run_evaluation.py has it"
                )
            # A language's answers lie in a file of each rank, in the order in which they were given.
            records.append((path.name.split(".")[0], record["problem"], record))
    for *_, record in sorted(records, key=lambda located: located[:2]):
        problem = record["language"], record["question"], record["gold"]
        answers[*problem, times[problem]] = record
        times[problem] += 1
    if not answers:
        raise InputError(f"{folder}: no answers in predictions/")
    return answers


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `folder/metrics.jsonl`.

    Raises:
        InputError: no such file, or a line that is not a JSON object with a step.
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
    """Accuracies with 95% Wilson intervals; for all but the first run the difference to it, and the test's p."""
    cells = _cells(task, runs)
    heads = ["language", f"{runs[0].name}, %"]
    for run in runs[1:]:
        heads += [f"{run.name}, %", "difference", "p"]
    lines = [f"## {task}", "", _row(heads), _row(["---"] * len(heads))]
    lines += [_row(row) for row in cells]
    return "\n".join(lines) + "\n\n" + _notes(task, runs) + "\n"


def _cells(task: str, runs: list[Run]) -> list[list[str]]:
    """The table's rows as texts: the languages, then the averages."""
    scores = [score(task, run.tasks[task].values()) for run in runs]
    paired = [pair(runs[0].tasks[task], run.tasks[task]) for run in runs[1:]]
    rows = []
    for language in _languages(task, runs):
        entries = [scored["languages"].get(language) for scored in scores]
        texts = [
            "" if e is None else f"{_percent(e['accuracy'])} ({_percent(e['low'])}-{_percent(e['high'])})"
            for e in entries
        ]
        row = [language, texts[0]]
        for text, other in zip(texts[1:], paired, strict=True):
            both = other.get(language)
            row += [text, *(("", "") if both is None else (f"{100 * both.difference:+.1f}", _p(both.p_value)))]
        rows.append(row)
    for name, title in (("average", "average"), ("average_without_english", "average without English")):
        values = [scored[name] for scored in scores]
        # Averages over different languages are not compared.
        if None not in values and all(scored["languages"].keys() == scores[0]["languages"].keys() for scored in scores):
            row = [title, _percent(values[0])]
            for value in values[1:]:
                row += [_percent(value), f"{100 * (value - values[0]):+.1f}", ""]
            rows.append(row)
    return rows


def _notes(task: str, runs: list[Run]) -> str:
    """What a reader of the table has to know."""
    first = runs[0].tasks[task].keys()
    shares = [
        f"{run.name} and {runs[0].name} have {len(first & run.tasks[task].keys())} problems in common of "
        f"{len(run.tasks[task])} and {len(first)}: p and the languages' differences are of those."
        for run in runs[1:]
        if first != run.tasks[task].keys()
    ]
    general = (
        f"In brackets the 95% Wilson interval. Difference in points to {runs[0].name}, p of the exact McNemar test on "
        "the same problems, not corrected for how many languages are tested. The languages' problems are translations "
        "of each other, so that no test is made of the average."
    )
    return " ".join([general, *shares])


def _languages(task: str, runs: list[Run]) -> list[str]:
    names = {key[0] for run in runs for key in run.tasks[task]}
    return [language.name for language in EVALUATION_TASKS[task].languages if language.name in names]


def page(tasks: list[str], runs: list[Run], curves: dict[str, list[dict[str, Any]]]) -> str:
    """The whole page. What a model or a user wrote is escaped."""
    sections = [_legend(runs), _settings(tasks, runs)]
    if curves:
        sections.append(_curves(curves))
    sections += [_section(task, runs) for task in tasks]
    title = " vs. ".join(run.name for run in runs)
    template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body="\n".join(sections))


def _legend(runs: list[Run]) -> str:
    names = (f"<li>{_swatch(number)} {html.escape(run.name)}</li>" for number, run in enumerate(runs))
    return f'<ul class="legend">{"".join(names)}</ul>'


def _swatch(number: int) -> str:
    return f'<span class="swatch" style="background:{COLOURS[number]}"></span>'


def _settings(tasks: list[str], runs: list[Run]) -> str:
    """What the runs were asked with; rows in which they differ stand out."""
    names = dict.fromkeys(name for task in tasks for run in runs for name in run.settings.get(task, {}))
    rows = []
    for name in names:
        values = [dict.fromkeys(str(run.settings.get(task, {}).get(name)) for task in tasks) for run in runs]
        texts = [", ".join(value if len(value) < 60 else f"{value[:12]}..." for value in mine) for mine in values]
        mark = "" if len(set(texts)) == 1 else ' class="differs"'
        rows.append(
            f"<tr{mark}><th>{html.escape(name)}</th>{''.join(f'<td>{html.escape(text)}</td>' for text in texts)}</tr>"
        )
    heads = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    return (
        f"<details><summary>Settings of the evaluations</summary>"
        f'<div class="scroll"><table><tr><th></th>{heads}</tr>{"".join(rows)}</table></div></details>'
    )


def _section(task: str, runs: list[Run]) -> str:
    notes = html.escape(_notes(task, runs))
    return (
        f"<section><h2>{html.escape(task)}</h2>{_intervals(task, runs)}{_accuracies(task, runs)}"
        f'<p class="note">{notes}</p><h3>Lengths and what was cut</h3>{_lengths(task, runs)}'
        f"<h3>Where the runs differ</h3>{_differences(task, runs)}</section>"
    )


def _intervals(task: str, runs: list[Run]) -> str:
    """A dot and its interval for each run, on one line of 0 to 100% for each language."""
    scores = [score(task, run.tasks[task].values())["languages"] for run in runs]
    rows = []
    for language in _languages(task, runs):
        marks = []
        for number, languages in enumerate(scores):
            if language in languages:
                entry = languages[language]
                low, high, middle = (f"{100 * entry[name]:.2f}" for name in ("low", "high", "accuracy"))
                label = html.escape(f"{runs[number].name}: {middle}% ({low}-{high})")
                marks.append(
                    f'<div class="mark" title="{label}" style="color:{COLOURS[number]}">'
                    f'<span class="bar" style="left:{low}%;right:calc(100% - {high}%)"></span>'
                    f'<span class="dot" style="left:{middle}%"></span></div>'
                )
        rows.append(f'<div class="name">{language}</div><div class="track">{"".join(marks)}</div>')
    axis = "".join(f'<span style="left:{place}%">{place}</span>' for place in (0, 25, 50, 75, 100))
    return f'<div class="chart">{"".join(rows)}<div class="name">%</div><div class="axis">{axis}</div></div>'


def _accuracies(task: str, runs: list[Run]) -> str:
    heads = f"<th>language</th><th>{_swatch(0)} {html.escape(runs[0].name)}</th>"
    for number, run in enumerate(runs[1:], start=1):
        heads += f"<th>{_swatch(number)} {html.escape(run.name)}</th><th>difference</th><th>p</th>"
    rows = "".join(_table_row(row) for row in _cells(task, runs))
    return f'<div class="scroll"><table class="figures"><tr>{heads}</tr>{rows}</table></div>'


def _lengths(task: str, runs: list[Run]) -> str:
    """Lengths of answers, and shares of problems that were cut, unfinished or without a readable answer."""
    heads = (
        "language",
        "run",
        "answer, characters: median",
        "longest",
        "source or prompt cut",
        "ran into --max_gen_len",
        "no answer read",
    )
    rows = []
    for language in _languages(task, runs):
        for number, run in enumerate(runs):
            records = [record for key, record in run.tasks[task].items() if key[0] == language]
            if records:
                lengths = [len(record["output"]) for record in records]
                shares = (
                    sum(bool(record["cut"]) for record in records),
                    sum(not record["stopped"] for record in records),
                    sum(record["parsed"] is None for record in records),
                )
                cells = (f"{statistics.median(lengths):.0f}", str(max(lengths)))
                cells += tuple(f"{_percent(share / len(records))}%" for share in shares)
                name = f"{_swatch(number)} {html.escape(run.name)}"
                rows.append(f"<tr><th>{language}</th><td>{name}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    return (
        f'<div class="scroll"><table class="figures"><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _differences(task: str, runs: list[Run]) -> str:
    """Every problem that some runs solved and others did not, with all answers; a script on the page filters them."""
    common = [key for key in runs[0].tasks[task] if all(key in run.tasks[task] for run in runs)]
    order = {name: place for place, name in enumerate(_languages(task, runs))}
    shown = sorted(
        (key for key in common if len({run.tasks[task][key]["right"] for run in runs}) == 2),
        key=lambda key: order[key[0]],
    )
    if not shown:
        return f"<p>All runs solved the same of the {len(common)} problems that all of them have.</p>"
    patterns = Counter(_pattern(task, key, runs) for key in shown)
    options = "".join(
        f'<option value="{pattern}">{html.escape(_solved_by(pattern, runs))} ({count})</option>'
        for pattern, count in patterns.most_common()
    )
    languages = Counter(key[0] for key in shown)
    names = "".join(f"<option>{name}</option>" for name in order if languages[name])
    return (
        '<div class="filters" hidden>'
        f'<select class="language" aria-label="language"><option value="">all languages</option>{names}</select>'
        f'<select class="pattern" aria-label="solved by"><option value="">solved by some</option>{options}</select>'
        '<input class="words" type="search" placeholder="words" aria-label="words"> <span class="count"></span></div>'
        f"<p>{len(shown)} of the {len(common)} problems that all runs have.</p>"
        f'<div class="problems">{"".join(_problem(task, key, runs) for key in shown)}</div>'
    )


def _problem(task: str, key: Key, runs: list[Run]) -> str:
    language, question, gold, _ = key
    answers = "".join(
        f"<dt>{_swatch(number)} {html.escape(run.name)}: {'right' if record['right'] else 'wrong'}"
        f"{'' if record['stopped'] else ', unfinished'}{', cut' if record['cut'] else ''}</dt>"
        f'<dd dir="auto">{html.escape(record["output"]) or "<i>nothing</i>"}</dd>'
        for number, run in enumerate(runs)
        for record in (run.tasks[task][key],)
    )
    marks = "".join(
        f'<span class="{"right" if run.tasks[task][key]["right"] else "wrong"}" style="border-color:{COLOURS[number]}" '
        f'title="{html.escape(run.name)}">{"✓" if run.tasks[task][key]["right"] else "✗"}</span>'
        for number, run in enumerate(runs)
    )
    return (
        f'<details data-language="{language}" data-pattern="{_pattern(task, key, runs)}">'
        f"<summary>{marks} <b>{language}</b> "
        f'<span class="question" lang="{LANGUAGES[language].code}" dir="auto">{html.escape(question)}</span></summary>'
        f'<dl><dt>Gold answer</dt><dd dir="auto">{html.escape(gold)}</dd>{answers}</dl></details>'
    )


def _pattern(task: str, key: Key, runs: list[Run]) -> str:
    return "".join(str(int(run.tasks[task][key]["right"])) for run in runs)


def _solved_by(pattern: str, runs: list[Run]) -> str:
    return f"only {' and '.join(run.name for run, right in zip(runs, pattern, strict=True) if right == '1')}"


def _curves(curves: dict[str, list[dict[str, Any]]]) -> str:
    """Training loss and dev perplexity over steps."""
    charts = []
    for name, label in (("loss", "training loss"), ("dev_perplexity", "dev perplexity")):
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            figure = Figure(figsize=(4.4, 3.2), layout="constrained")
            axes = figure.add_subplot()
            for number, lines in enumerate(curves.values()):
                points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
                colour, marker = COLOURS[number % len(COLOURS)], "o" if name == "dev_perplexity" else None
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, linewidth=1)
            axes.set_xlabel("optimizer step")
            axes.set_title(label, fontsize=10)
            axes.set_yscale("log")
            # 4, not 4 x 10^0.
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            axes.spines[["top", "right"]].set_visible(False)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        charts.append(svg[svg.index("<svg") :])
    names = "".join(
        f"<li>{_swatch(number % len(COLOURS))} {html.escape(folder)}</li>" for number, folder in enumerate(curves)
    )
    charts = f'<div class="curves">{"".join(charts)}</div>'
    return f'<section><h2>Training</h2><ul class="legend">{names}</ul>{charts}</section>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _row(cells: Iterable[str]) -> str:
    # A bar would end the cell.
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _table_row(cells: list[str]) -> str:
    return f"<tr><th>{html.escape(cells[0])}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells[1:])}</tr>"


def main() -> None:
    """Parse the command line and write the page."""
    print(write_comparison(parse_comparison(sys.argv[1:])))


if __name__ == "__main__":
    exit_with_message(main)

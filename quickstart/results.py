"""Report on the quickstart's figures in `results/`: two tables, `quickstart/results.html` and `results.json`."""

import html
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.io import read_json, write_json, write_text
from mindmerger.evaluation.report import read_predictions
from quickstart.compare_merges import METHODS

HOME = Path(__file__).parent
RESULTS = Path("results")
BASELINE = RESULTS / "quickstart-baseline" / "mgsm"
MAPPED = RESULTS / "quickstart" / "mgsm"
MERGES = RESULTS / "quickstart-regmean" / "scores.json"

# Languages of the problems shown with both answers.
EXAMPLE_CODES = ("de", "es", "sw", "ru", "zh")
_BEFORE, _AFTER, _LINE = "#b8b8b8", "#2f6db3", "#c8553d"


def gather(seconds: dict[str, float]) -> dict[str, Any]:
    """Collect all figures of the quickstart for `results.json`; accuracies are from 0 to 1.

    Args:
        seconds: duration of each step.
    """
    merges = read_json(MERGES)
    return {
        "mindmerger": {"baseline": _accuracies(BASELINE), "mapped": _accuracies(MAPPED)},
        "regmean": {kind: merges[kind] for kind in ("specialists", "average", *METHODS) if kind in merges},
        "seconds": seconds,
    }


def report(seconds: dict[str, float]) -> str:
    """Write `results.json` and `results.html` beside this file; return both tables as text."""
    results = gather(seconds)
    write_json(HOME / "results.json", results)
    write_text(HOME / "results.html", _page(results))
    return f"{_mindmerger_table(results['mindmerger'])}\n\n{_regmean_table(results['regmean'])}"


def without_english(accuracies: dict[str, float]) -> float:
    """Average over all languages except English."""
    others = [accuracy for language, accuracy in accuracies.items() if language != "English"]
    return sum(others) / len(others)


def mean(accuracies: dict[str, float]) -> float:
    """Average over tasks."""
    return sum(accuracies.values()) / len(accuracies)


def _accuracies(folder: Path) -> dict[str, float]:
    return {language: entry["accuracy"] for language, entry in read_json(folder / "scores.json")["languages"].items()}


def _mindmerger_table(figures: dict[str, dict[str, float]]) -> str:
    before, after = figures["baseline"], figures["mapped"]
    lines = [f"{'MindMerger: accuracy, %':<26}{'LLM alone':>12}{'with mapping':>14}"]
    lines += [_row(language, before[language], after[language]) for language in after]
    lines.append(_row("average without English", without_english(before), without_english(after)))
    return "\n".join(lines)


def _row(name: str, before: float, after: float) -> str:
    return f"{name:<26}{100 * before:>12.1f}{100 * after:>14.1f}"


def _regmean_table(figures: dict[str, Any]) -> str:
    models = _merged_models(figures)
    tasks = list(figures["average"])
    lines = [f"{'RegMean: accuracy, %':<30}" + "".join(f"{task:>12}" for task in tasks) + f"{'mean':>12}"]
    for name, accuracies in models.items():
        cells = [accuracies[task] for task in tasks] + [mean(accuracies)]
        lines.append(f"{name:<30}" + "".join(f"{100 * cell:>12.1f}" for cell in cells))
    return "\n".join(lines)


def _merged_models(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    models = {f"{name} specialist": accuracies for name, accuracies in figures["specialists"].items()}
    models["average"] = figures["average"]
    return models | {
        f"{name}, alpha {alpha}": accuracies
        for method, name in METHODS.items()
        for alpha, accuracies in figures.get(method, {}).items()
    }


def _page(results: dict[str, Any]) -> str:
    minutes = sum(results["seconds"].values()) / 60
    steps = "".join(f"<tr><td>{name}</td><td>{value:.0f}</td></tr>" for name, value in results["seconds"].items())
    return _PAGE.format(
        bars=_svg(_bars(results["mindmerger"])),
        curve=_svg(_curve(results["regmean"])),
        mapped=MAPPED / "scores.json",
        baseline=BASELINE / "scores.json",
        merges=MERGES,
        mindmerger_table=html.escape(_mindmerger_table(results["mindmerger"])),
        regmean_table=html.escape(_regmean_table(results["regmean"])),
        examples="".join(_example(code) for code in EXAMPLE_CODES),
        minutes=f"{minutes:.1f}",
        steps=steps,
    )


def _example(code: str) -> str:
    """First problem in this language, with both answers, right or wrong."""
    mapped, alone = (read_predictions(folder, code)[0] for folder in (MAPPED, BASELINE))
    answers = "".join(
        f"<tr><td>{name}</td><td>{html.escape(answer['output'])}</td><td>{'right' if answer['right'] else 'wrong'}</td>"
        for name, answer in (("LLM alone", alone), ("with the mapping", mapped))
    )
    question = html.escape(mapped["question"])
    return (
        f"<h3>{mapped['language']}</h3><p lang={code}>{question} <small>(answer: {html.escape(mapped['gold'])})</small>"
        f"</p><table>{answers}</table>"
    )


def _bars(figures: dict[str, dict[str, float]]) -> Figure:
    languages = list(figures["mapped"])
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for shift, (name, key, colour) in enumerate(
        (("LLM alone", "baseline", _BEFORE), ("with the mapping", "mapped", _AFTER))
    ):
        heights = [100 * figures[key][language] for language in languages]
        places = [place + 0.4 * shift - 0.2 for place in range(len(languages))]
        bars = axes.bar(places, heights, width=0.38, color=colour, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylabel("problems solved, %")
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.legend(frameon=False, ncols=2, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _curve(figures: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    alphas = list(figures["regmean"])
    # Evenly spaced: values between 0.9 and 1 would not be distinguishable on a linear axis.
    places = range(len(alphas))
    for method, name in METHODS.items():
        known = [alpha for alpha in alphas if alpha in figures.get(method, {})]
        heights = [100 * mean(figures[method][alpha]) for alpha in known]
        look = {"color": _AFTER} if method == "regmean" else {}
        if known:
            axes.plot([alphas.index(alpha) for alpha in known], heights, "o-", label=name, **look)
    axes.axhline(100 * mean(figures["average"]), color=_LINE, linestyle="--", label="plain average")
    own = [accuracies[name] for name, accuracies in figures["specialists"].items()]
    axes.axhline(100 * sum(own) / len(own), color="#444444", linestyle=":", label="each specialist on its own task")
    axes.set_xticks(places, alphas)
    axes.set_xlabel("alpha, the factor on the Grams' off-diagonals")
    axes.set_ylabel("mean of both tasks, %")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, loc="lower center")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quickstart: MindMerger and RegMean</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1, h2, h3 {{ line-height: 1.2; }} h3 {{ margin-bottom: 0; }} p {{ margin: .4rem 0; }}
svg {{ width: 100%; height: auto; }}
pre {{ overflow-x: auto; background: #f5f5f2; padding: .8rem; font-size: .85rem; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
td {{ border-top: 1px solid #ddd; padding: .2rem .8rem .2rem 0; vertical-align: top; }}
small, .source {{ color: #666; font-size: .85rem; }}
</style>
</head>
<body>
<h1>What the two methods did on this machine</h1>
<p>A small world: word problems in six languages, models of about a million parameters, {minutes} minutes in all.</p>

<h2>MindMerger: an LLM answers in languages that it cannot read</h2>
<p>The LLM has read English only. It and the encoder stay as they were; a mapping between them was trained.</p>
{bars}
<p class="source">From {baseline} and {mapped}.</p>
<pre>{mindmerger_table}</pre>

<h2>The same question, both answers</h2>
<p>The first test problem, in five languages.</p>
{examples}

<h2>RegMean: two specialists in one model</h2>
<p>Both specialists were fine-tuned from one small model, and merged by plain averaging and by RegMean.</p>
{curve}
<p class="source">From {merges}.</p>
<pre>{regmean_table}</pre>

<h2>Time</h2>
<table><tr><td>step</td><td>seconds</td></tr>{steps}</table>
</body>
</html>
"""

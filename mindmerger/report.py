"""From judged answers to scores, a table and a chart."""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import exit_with_message
from common.files import atomic_path, write_json, write_text
from mindmerger.tasks import LANGUAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = "scores.json"


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95% at the default z (Wilson 1927; Brown, Cai, DasGupta 2001)."""
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def score(task: str, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies from 0 to 1, by language and on average.

    Args:
        task: its name.
        records: judged answers, each with `language`, `right`, `parsed`, `cut` and `stopped`.

    Returns:
        `languages`: for each, `accuracy`, `low` and `high` (95% Wilson interval), `count`, `unanswered` (no number
        or label was found), `cut` (source or prompt shortened), `unfinished` (ran into --max_gen_len);
        `average`: over languages; `average_without_english`: None where only English was asked.
    """
    by_language: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_language.setdefault(record["language"], []).append(record)
    languages = {}
    for language, answers in by_language.items():
        right = sum(answer["right"] for answer in answers)
        low, high = wilson_interval(right, len(answers))
        languages[language] = {
            "accuracy": right / len(answers),
            "low": low,
            "high": high,
            "count": len(answers),
            "unanswered": sum(answer["parsed"] is None for answer in answers),
            "cut": sum(bool(answer["cut"]) for answer in answers),
            "unfinished": sum(not answer["stopped"] for answer in answers),
        }
    accuracies = {language: entry["accuracy"] for language, entry in languages.items()}
    others = [accuracy for language, accuracy in accuracies.items() if language != "English"]
    return {
        "task": task,
        "average": sum(accuracies.values()) / len(accuracies),
        "average_without_english": sum(others) / len(others) if others else None,
        "languages": languages,
    }


def table(scores: dict[str, Any]) -> str:
    """The scores as tab-separated lines, accuracies in percent."""
    columns = ("accuracy", "low", "high", "count", "unanswered", "cut", "unfinished")
    lines = ["\t".join(("language", *columns))]
    for language, entry in scores["languages"].items():
        cells = [f"{entry[c] * 100:.1f}" for c in columns[:3]] + [str(entry[c]) for c in columns[3:]]
        lines.append("\t".join((language, *cells)))
    lines.append(f"average\t{scores['average'] * 100:.1f}")
    if scores["average_without_english"] is not None:
        lines.append(f"average without English\t{scores['average_without_english'] * 100:.1f}")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, scores: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write `predictions/{code}.jsonl`, `scores.tsv`, `accuracy.png` and, last, `scores.json`."""
    for language in scores["languages"]:
        lines = [json.dumps(r, ensure_ascii=False) for r in records if r["language"] == language]
        write_text(folder / "predictions" / f"{LANGUAGES[language].code}.jsonl", "\n".join(lines) + "\n")
    write_text(folder / "scores.tsv", table(scores))
    with atomic_path(folder / "accuracy.png") as partial:
        _bar_chart(scores).savefig(partial, format="png", dpi=150)
    write_json(folder / SCORES, scores)


def _bar_chart(scores: dict[str, Any]) -> "Figure":
    # Seconds to import, and most who import this module draw nothing.
    from matplotlib.figure import Figure

    languages = list(scores["languages"])
    entries = [scores["languages"][language] for language in languages]
    heights = [entry["accuracy"] * 100 for entry in entries]
    below = [max(0.0, (entry["accuracy"] - entry["low"]) * 100) for entry in entries]
    above = [max(0.0, (entry["high"] - entry["accuracy"]) * 100) for entry in entries]

    figure = Figure(figsize=(max(4.0, 0.8 * len(languages) + 1.5), 4.0), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(languages, heights, yerr=[below, above], color="#4c78a8", ecolor="#555555", capsize=3)
    axes.bar_label(bars, [f"{height:.1f}" for height in heights], padding=2, fontsize=8)
    axes.axhline(scores["average"] * 100, color="#e45756", linewidth=1, label=f"average {scores['average'] * 100:.1f}")
    axes.set_ylabel("accuracy, % (95% Wilson interval)")
    axes.set_ylim(0, max(5.0, min(100.0, 1.15 * max(h + a for h, a in zip(heights, above, strict=True)))))
    axes.set_title(f"{scores['task']}, {sum(entry['count'] for entry in entries)} problems")
    axes.tick_params(axis="x", rotation=35)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    """Compare evaluations: `python -m mindmerger.report results/A results/B ...`"""
    # It is built on this module.
    from mindmerger.comparison import parse_comparison, write_comparison

    print(write_comparison(parse_comparison(sys.argv[1:])))


if __name__ == "__main__":
    exit_with_message(main)

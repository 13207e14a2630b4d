"""Scores of graded answers: accuracies, their intervals, and a table."""

import math
from collections.abc import Iterable
from typing import Any

SCORES = "scores.json"


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95% at the default z (Wilson 1927; Brown, Cai, DasGupta 2001)."""
    fraction, spread = right / count, z * z / count
    centre = (fraction + spread / 2) / (1 + spread)
    half = z * math.sqrt(fraction * (1 - fraction) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def score(task: str, records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Compute accuracies from 0 to 1, by language and on average.

    Args:
        task: name of the task.
        records: graded answers, each with `language`, `right`, `parsed`, `cut` and `stopped`.

    Returns:
        `languages`: for each, `accuracy`, `low` and `high` (95% Wilson interval), `count`, `unanswered` (no number
        or label was found), `cut` (source or prompt shortened), `unfinished` (reached --max_gen_len);
        `average`: mean over languages; `average_without_english`: None if English is the only language.
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
    """Format scores as tab-separated lines, with accuracies in percent.

    If they were compared with the LLM alone, also the problems gained and lost, and p.
    """
    percents, counts = ("accuracy", "low", "high"), ["count", "unanswered", "cut", "unfinished"]
    paired = all("p" in entry for entry in scores["languages"].values())
    counts += ["gained", "lost"] if paired else []
    lines = ["\t".join(("language", *percents, *counts, *(["p"] if paired else [])))]
    for language, entry in scores["languages"].items():
        cells = [f"{entry[c] * 100:.1f}" for c in percents] + [str(entry[c]) for c in counts]
        cells += [f"{entry['p']:.2g}"] if paired else []
        lines.append("\t".join((language, *cells)))
    lines.append(f"average\t{scores['average'] * 100:.1f}")
    if scores["average_without_english"] is not None:
        lines.append(f"average without English\t{scores['average_without_english'] * 100:.1f}")
    return "\n".join(lines) + "\n"

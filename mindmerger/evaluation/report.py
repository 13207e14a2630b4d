"""What an evaluation leaves behind: answers, a table, a chart."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.io import atomic_path, write_json, write_text
from mindmerger.evaluation.metrics import SCORES, table
from mindmerger.tasks import LANGUAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    # Seconds to import.
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

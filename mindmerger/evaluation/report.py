"""Files of an evaluation: answers, a table and a chart."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.io import atomic_path, read_json, write_json, write_text, writing
from common.runs import RUN
from mindmerger.evaluation.metrics import SCORES, table
from mindmerger.evaluation.paired import compare_answers
from mindmerger.tasks import LANGUAGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREDICTIONS = "predictions"


def append_predictions(folder: Path, records: list[dict[str, Any]], rank: int) -> None:
    """Append graded answers to `predictions/{code}.jsonl`; ranks above 0 to `predictions/{code}.rank_{n}.jsonl`."""
    for record in records:
        code = LANGUAGES[record["language"]].code
        path = folder / PREDICTIONS / (f"{code}.rank_{rank}.jsonl" if rank else f"{code}.jsonl")
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def drop_cut_lines(folder: Path) -> None:
    """Remove an incomplete last line, left by a killed run, from each file of predictions."""
    for path in (folder / PREDICTIONS).glob("*.jsonl"):
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            with writing(path), path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def read_predictions(folder: Path, code: str = "*") -> list[dict[str, Any]]:
    """Read the graded answers of all ranks, sorted by problem; malformed lines are skipped.

    Args:
        folder: folder of one task's results.
        code: code of the language to read; default: all languages.
    """
    records: dict[int, dict[str, Any]] = {}
    for path in (folder / PREDICTIONS).glob(f"{code}.*jsonl"):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                records[record["problem"]] = record
            except (json.JSONDecodeError, TypeError, KeyError):
                continue
    return [records[problem] for problem in sorted(records)]


def find_alone(results: Path, task: str, settings: dict[str, Any]) -> Path | None:
    """Folder of a finished evaluation in `results/*/{task}` of the LLM alone, on the same problems as `settings`.

    None if there is none; folders with a damaged record are skipped.
    """
    same = (
        "llm_path",
        "llm_revision",
        "chat_template",
        "problems_sha256",
        "max_gen_len",
        "answer_parser",
        "classification",
    )
    for path in sorted(results.glob(f"*/{task}/{RUN}")):
        try:
            run = read_json(path)
            theirs, finished = run["settings"], "result" in run and (path.parent / SCORES).is_file()
            alone = theirs.get("mapping_sha256") is None
        except (InputError, TypeError, KeyError, AttributeError):
            continue
        if finished and alone and all(theirs.get(key) == settings.get(key) for key in same):
            return path.parent
    return None


def compare_with_alone(folder: Path, settings: dict[str, Any]) -> None:
    """Add to the scores of a mapping in `folder` the comparison with the LLM alone, if `find_alone` finds it."""
    alone = find_alone(folder.parent.parent, folder.name, settings)
    if settings.get("mapping_sha256") is None or alone is None:
        return
    compared = compare_answers(read_predictions(folder), read_predictions(alone))
    scores = read_json(folder / SCORES)
    languages = {name: entry | compared.get(name, {}) for name, entry in scores["languages"].items()}
    if languages != scores["languages"]:
        write_report(folder, scores | {"languages": languages})


def write_report(folder: Path, scores: dict[str, Any]) -> None:
    """Write `scores.tsv`, `accuracy.png` and finally `scores.json`."""
    write_text(folder / "scores.tsv", table(scores))
    with atomic_path(folder / "accuracy.png") as partial:
        _bar_chart(scores).savefig(partial, format="png", dpi=150)
    write_json(folder / SCORES, scores)


def _bar_chart(scores: dict[str, Any]) -> "Figure":
    # Imported here, since it takes seconds.
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

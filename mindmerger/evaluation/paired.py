"""Comparisons of a mapping with the LLM alone on the same rows, and the verdict of each language.

Every language is tested at `LEVEL` by itself, without a correction for their number: a false verdict about one of them
changes nothing in the others.
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np

Verdict = Literal["helps", "harms", "cannot be told"]
LEVEL = 0.05
RESAMPLES = 10_000
# With fewer rows, resamples are too alike for a test.
FEWEST_ROWS = 10
# Random numbers drawn at once.
_AT_ONCE = 2_000_000


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test (1947): the binomial test that gains and losses are equally likely."""
    count = gained + lost
    ways = tail = 1
    for k in range(min(gained, lost)):
        ways = ways * (count - k) // (k + 1)  # binomial coefficient of count and k + 1
        tail += ways
    return min(1.0, 2 * tail / 2**count)


def bootstrap(gains: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float, float]:
    """Percentile bootstrap over rows of the mean of `gains` (Efron 1979; paired: Koehn 2004).

    Returns:
        Ends of the 95% interval, and the two-sided p of a mean of zero.
    """
    rng, count, means = np.random.default_rng(seed), len(gains), []
    size = max(1, _AT_ONCE // count)
    for start in range(0, resamples, size):
        rows = rng.integers(count, size=(min(size, resamples - start), count))
        means.append(gains[rows].mean(axis=1))
    joined = np.concatenate(means)
    low, high = np.quantile(joined, [LEVEL / 2, 1 - LEVEL / 2])
    fewer = min(int((joined <= 0).sum()), int((joined >= 0).sum()))
    return float(low), float(high), min(1.0, 2 * (fewer + 1) / (resamples + 1))


def verdict(gain: float, p: float) -> Verdict:
    """Verdict of one language from the mapping's gain and its p."""
    if p >= LEVEL:
        return "cannot be told"
    return "helps" if gain > 0 else "harms"


def compare_answers(
    mapped: Iterable[dict[str, Any]], alone: Iterable[dict[str, Any]]
) -> dict[str, dict[str, int | float]]:
    """Count, by language, the problems `gained` and `lost` by the mapping, with McNemar's `p`.

    Args:
        mapped, alone: graded answers to the same problems, with the mapping and by the LLM alone, each with `problem`,
            `language` and `right`.
    """
    right_alone = {record["problem"]: record["right"] for record in alone}
    found: dict[str, dict[str, int | float]] = {}
    for record in mapped:
        if record["problem"] not in right_alone:
            continue
        entry = found.setdefault(record["language"], {"gained": 0, "lost": 0})
        entry["gained"] += record["right"] and not right_alone[record["problem"]]
        entry["lost"] += right_alone[record["problem"]] and not record["right"]
    return {name: entry | {"p": mcnemar(entry["gained"], entry["lost"])} for name, entry in found.items()}


def judge_answers(comparisons: Iterable[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Verdicts by language from results of `compare_answers` for one or more tasks, whose counts are added."""
    totals: dict[str, tuple[int, int]] = {}
    for comparison in comparisons:
        for name, entry in comparison.items():
            gained, lost = totals.get(name, (0, 0))
            totals[name] = (gained + entry["gained"], lost + entry["lost"])
    judged = {}
    for name, (gained, lost) in totals.items():
        p = mcnemar(gained, lost)
        judged[name] = {"verdict": verdict(gained - lost, p), "by": "answers", "gained": gained, "lost": lost, "p": p}
    return judged


def judge_losses(
    languages: list[str], mapped: np.ndarray, alone: np.ndarray, tokens: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Verdicts by language from losses of the same targets, with the mapping and by the LLM alone.

    Args:
        languages: English name of each row's language.
        mapped, alone: summed loss of each row in nats.
        tokens: target tokens of each row.

    Returns:
        For each language `verdict`, `rows`, nats per token with the mapping (`mapped`) and without (`alone`), and
        `gain`: nats that the mapping saves in a row on average, with its 95% interval `low` to `high`, and `p`. Of too
        few rows, or a loss that is not finite, there is no `gain`, and the verdict is "cannot be told".
    """
    judged = {}
    for name in sorted(set(languages)):
        rows = np.array([language == name for language in languages])
        gains, total = alone[rows] - mapped[rows], tokens[rows].sum()
        entry: dict[str, Any] = {"verdict": "cannot be told", "by": "likelihood", "rows": int(rows.sum())}
        if np.isfinite(gains).all():
            entry |= {"mapped": _rounded(mapped[rows].sum() / total), "alone": _rounded(alone[rows].sum() / total)}
        if np.isfinite(gains).all() and len(gains) >= FEWEST_ROWS:
            low, high, p = bootstrap(gains)
            entry |= {"verdict": verdict(gains.mean(), p), "gain": _rounded(gains.mean())}
            entry |= {"low": _rounded(low), "high": _rounded(high), "p": p}
        judged[name] = entry
    return judged


def summary(judged: dict[str, dict[str, Any]]) -> str:
    """List the languages of each verdict in one line."""
    kinds = {kind: [name for name, entry in judged.items() if entry["verdict"] == kind] for kind in get_args(Verdict)}
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)


def _rounded(value: float) -> float:
    return round(float(value), 6)

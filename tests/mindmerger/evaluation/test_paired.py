"""Paired comparisons against computations of their own: exact sums in fractions, and a second bootstrap."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from mindmerger.evaluation.paired import bootstrap, compare_answers, judge_answers, judge_losses, mcnemar, summary


def test_mcnemar_is_the_binomial_test_that_sums_all_outcomes_as_rare() -> None:
    for count in range(13):
        ways = {
            k: Fraction(math.factorial(count), math.factorial(k) * math.factorial(count - k)) for k in range(count + 1)
        }
        for gained in range(count + 1):
            rare = sum(number for number in ways.values() if number <= ways[gained])
            assert mcnemar(gained, count - gained) == pytest.approx(float(rare / 2**count), rel=1e-14)
    # Fagerland, Lydersen, Laake 2013: 1 against 7 discordant pairs.
    assert mcnemar(1, 7) == pytest.approx(0.0703125)
    assert 0 < mcnemar(300, 900) < 1e-60 and mcnemar(3000, 3000) == 1


def test_the_bootstrap_equals_another_one_of_other_random_numbers() -> None:
    """Both have the errors of their resamples: three standard deviations of a fraction and of a quantile."""
    rng, other = np.random.default_rng(5), random.Random(7)
    gains = rng.exponential(size=40) - 0.75
    low, high, p = bootstrap(gains)
    assert (low, high, p) == bootstrap(gains) != bootstrap(gains, seed=1)
    means = sorted(math.fsum(other.choices(gains.tolist(), k=40)) / 40 for _ in range(4000))
    assert low == pytest.approx(means[100], abs=0.03) and high == pytest.approx(means[3899], abs=0.03)
    assert p == pytest.approx(2 * sum(mean <= 0 for mean in means) / 4000, abs=0.03)
    assert 0.01 < p < 0.5
    # Drawn in several parts.
    assert bootstrap(np.full(900, 0.5)) == (0.5, 0.5, 2 / 10_001)
    assert bootstrap(np.zeros(30)) == (0, 0, 1)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_the_intervals_cover_and_the_test_has_its_level(draw: str) -> None:
    """500 data sets whose true mean is zero: 95% of them, up to the bias of few skewed rows."""
    rng = np.random.default_rng(0)
    covered = refused = 0
    for _ in range(500):
        gains = getattr(rng, draw)(size=60)
        low, high, p = bootstrap(gains - (draw == "exponential"), resamples=400)
        covered += low <= 0 <= high
        refused += p < 0.05
    assert 0.91 <= covered / 500 <= 0.98 and 0.02 <= refused / 500 <= 0.09


def test_verdicts_of_losses() -> None:
    rng = np.random.default_rng(1)
    languages = ["German", "English", "Thai", "Chinese", "Swahili"] * 50 + ["Greek"] * 9
    alone, tokens = rng.uniform(5, 20, size=259), rng.integers(2, 9, size=259)
    shift = {"German": -2.0, "English": 0.7, "Thai": 0.0, "Chinese": math.nan, "Swahili": -2.0, "Greek": -2.0}
    mapped = alone + np.array([shift[name] for name in languages]) + rng.normal(size=259)
    mapped[4] = math.inf
    judged = judge_losses(languages, mapped, alone, tokens)
    assert summary(judged) == "helps: German; harms: English; cannot be told: Chinese, Greek, Swahili, Thai"
    for name in ("German", "English", "Thai"):
        rows = [row for row, language in enumerate(languages) if language == name]
        entry, total = judged[name], sum(int(tokens[row]) for row in rows)
        assert entry["rows"] == 50 and entry["by"] == "likelihood"
        assert entry["mapped"] == pytest.approx(math.fsum(mapped[rows]) / total, abs=1e-6)
        assert entry["alone"] == pytest.approx(math.fsum(alone[rows]) / total, abs=1e-6)
        assert entry["gain"] == pytest.approx(math.fsum(alone[rows] - mapped[rows]) / 50, abs=1e-6)
        assert entry["low"] < entry["gain"] < entry["high"]
    assert judged["Greek"].keys() == {"verdict", "by", "rows", "mapped", "alone"}
    assert judged["Swahili"] == judged["Chinese"] == {"verdict": "cannot be told", "by": "likelihood", "rows": 50}


def test_verdicts_of_answers_to_two_tasks() -> None:
    def answers(right: dict[str, str]) -> list[dict]:
        letters = [(name, letter) for name, word in right.items() for letter in word]
        return [{"problem": n, "language": name, "right": letter == "r"} for n, (name, letter) in enumerate(letters)]

    alone = answers({"German": "rwww wwww".replace(" ", ""), "English": "rrrrrrww", "Thai": "rw"})
    mapped = answers({"German": "wrrrrrrr", "English": "wwwwwwww", "Thai": "rw"})
    compared = compare_answers(reversed(mapped), alone)
    assert compared["German"] == {"gained": 7, "lost": 1, "p": mcnemar(7, 1)}
    assert compared["English"] == {"gained": 0, "lost": 6, "p": 2 / 64}
    assert compared["Thai"] == {"gained": 0, "lost": 0, "p": 1}
    judged = judge_answers([compared, {"German": {"gained": 3, "lost": 0}}])
    assert judged["German"] == {"verdict": "helps", "by": "answers", "gained": 10, "lost": 1, "p": mcnemar(10, 1)}
    assert summary(judged) == "helps: German; harms: English; cannot be told: Thai"
    assert judge_answers([compared])["German"]["verdict"] == "cannot be told"

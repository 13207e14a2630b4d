"""Confidence intervals by the bootstrap over texts."""

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 1000


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of sum(numerators) / sum(denominators) (Efron and Tibshirani 1993, chapter 13).

    Texts are drawn with replacement, each with its numerator and its denominator. For losses and token counts, this is
    the interval of the loss per token; for the difference of two models' losses and the counts, that of the paired
    difference.

    Args:
        numerators, denominators: values per text, float or int of shape (texts,); the denominators positive.
        level: confidence level.

    Returns:
        Lower and upper end; deterministic, since the draws are seeded.
    """
    generator, count = np.random.default_rng(0), len(numerators)
    ratios = []
    for _ in range(0, RESAMPLES, _AT_ONCE):
        drawn = generator.integers(count, size=(_AT_ONCE, count))
        ratios.append(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)

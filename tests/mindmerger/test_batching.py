import itertools
import random

import pytest

from mindmerger.batching import plan_epoch, plan_once

_RANDOM = random.Random(0)
# With the spread of lengths of word problems.
LENGTHS = [round(_RANDOM.lognormvariate(4.8, 0.4)) for _ in range(1003)]


def flat(step: list[list[list[int]]]) -> list[int]:
    return [row for micro_batches in step for micro_batch in micro_batches for row in micro_batch]


@pytest.mark.parametrize(("accumulation", "ranks"), [(1, 1), (16, 1), (8, 2), (2, 8), (1, 16)])
def test_an_epoch_sees_every_row_once_in_the_same_global_batches(accumulation: int, ranks: int) -> None:
    plan = list(plan_epoch(LENGTHS, 128, accumulation, ranks, seed=3, epoch=1))
    assert sorted(row for step in plan for row in flat(step)) == list(range(1003))
    reference = list(plan_epoch(LENGTHS, 128, 1, 1, seed=3, epoch=1))
    assert [sorted(flat(step)) for step in plan] == [sorted(flat(step)) for step in reference]
    for micros in (micros for step in plan[:-1] for micros in step):
        assert len({len(micro) for micro in micros}) == 1 and micros[0]


def test_each_epoch_and_seed_has_its_own_shuffle() -> None:
    plans = [next(plan_epoch(LENGTHS, 128, 1, 1, seed, epoch)) for seed, epoch in itertools.product(range(2), range(3))]
    assert len({tuple(flat(step)) for step in plans}) == 6
    assert plans[0] == next(plan_epoch(LENGTHS, 128, 1, 1, 0, 0))


def test_micro_batches_are_of_like_tokens_their_rows_and_the_ranks_of_like_length() -> None:
    step = next(plan_epoch(LENGTHS, 128, 8, 2, seed=0, epoch=0))
    longest = [[max(LENGTHS[row] for row in micro) for micro in micros] for micros in step]
    padded = sum(len(micro) * max(LENGTHS[row] for row in micro) for micros in step for micro in micros)
    assert padded < 1.15 * sum(LENGTHS[row] for row in flat(step))
    assert all(abs(a - b) <= 0.25 * max(a, b) for a, b in longest)
    tokens = [sum(LENGTHS[row] for row in micro) for micros in step for micro in micros]
    assert max(tokens) < 1.2 * sum(tokens) / len(tokens)
    assert len({len(micros[0]) for micros in step}) > 4


@pytest.mark.parametrize("lengths", [[1000, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1000], [7] * 6, [1, 2, 3, 50, 60, 70]])
def test_no_micro_batch_is_empty_while_there_are_rows_for_all(lengths: list[int]) -> None:
    for accumulation, ranks in [(1, 6), (2, 3), (3, 2), (6, 1)]:
        (step,) = plan_epoch(lengths, 6, accumulation, ranks, seed=0, epoch=0)
        assert sorted(flat(step)) == list(range(6))
        assert all(micro for micros in step for micro in micros)


def test_a_last_batch_of_few_rows_leaves_some_micro_batches_empty() -> None:
    (step,) = plan_epoch([3, 1, 2], 16, 4, 2, seed=0, epoch=0)
    assert sorted(flat(step)) == [0, 1, 2]
    assert [len(micros) for micros in step] == [2, 2, 2, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_sees_every_row_once_with_as_many_batches_on_every_rank(ranks: int) -> None:
    plan = plan_once(LENGTHS, 8, ranks)
    assert sorted(row for batches in plan for rows in batches for row in rows) == list(range(1003))
    assert len({len(batches) for batches in plan}) == 1
    assert LENGTHS[plan[0][0][0]] == max(LENGTHS)

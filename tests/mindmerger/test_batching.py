import itertools
import random

import pytest

from mindmerger.batching import plan_epoch, plan_once

LENGTHS = [random.Random(0).randint(5, 400) for _ in range(1003)]


def flat(step: list[list[list[int]]]) -> list[int]:
    return [row for micro_batches in step for micro_batch in micro_batches for row in micro_batch]


@pytest.mark.parametrize(("accumulation", "ranks"), [(1, 1), (16, 1), (8, 2), (2, 8), (1, 16)])
def test_an_epoch_sees_every_row_once_in_the_same_global_batches(accumulation: int, ranks: int) -> None:
    plan = plan_epoch(LENGTHS, 128, accumulation, ranks, seed=3, epoch=1)
    assert sorted(row for step in plan for row in flat(step)) == list(range(1003))
    reference = plan_epoch(LENGTHS, 128, 1, 1, seed=3, epoch=1)
    assert [sorted(flat(step)) for step in plan] == [sorted(flat(step)) for step in reference]
    for step in plan[:-1]:
        assert {len(micro) for micros in step for micro in micros} == {128 // (accumulation * ranks)}
    assert max(len(micro) for micros in plan[-1] for micro in micros) <= 128 // (accumulation * ranks)


def test_each_epoch_and_seed_has_its_own_shuffle() -> None:
    plans = [plan_epoch(LENGTHS, 128, 1, 1, seed, epoch)[0] for seed, epoch in itertools.product(range(2), range(3))]
    assert len({tuple(flat(step)) for step in plans}) == 6
    assert plans[0] == plan_epoch(LENGTHS, 128, 1, 1, 0, 0)[0]


def test_rows_of_a_micro_batch_and_of_ranks_side_by_side_are_of_like_length() -> None:
    step = plan_epoch(LENGTHS, 128, 8, 2, seed=0, epoch=0)[0]
    longest = [[max(LENGTHS[row] for row in micro) for micro in micros] for micros in step]
    padded = sum(len(micro) * max(LENGTHS[row] for row in micro) for micros in step for micro in micros)
    assert padded < 1.15 * sum(LENGTHS[row] for row in flat(step))
    assert all(abs(a - b) <= 0.1 * max(a, b) for a, b in longest)


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

import json

import numpy as np
import pytest

from components.data import streams
from components.data.streams import Plan, draw

PLAN = Plan(seed=0, batch_size=8, forget=21, normal=13, pool=30, responses=2)


def test_each_epoch_uses_every_forget_row_once_the_last_partial_batch_included() -> None:
    assert PLAN.steps_per_epoch == 3
    orders = []
    for epoch in range(3):
        steps = [PLAN.step_rows(epoch * 3 + place).forget for place in range(3)]
        assert [len(step) for step in steps] == [8, 8, 5]
        orders.append(np.concatenate(steps).tolist())
        assert sorted(orders[-1]) == list(range(21))
    assert orders[0] != orders[1] != orders[2]


def test_normal_rows_cycle_through_fresh_permutations() -> None:
    rows = np.concatenate([PLAN.step_rows(step).normal for step in range(9)])
    assert len(rows) == 63
    for start in range(0, 52, 13):
        assert sorted(rows[start : start + 13]) == list(range(13))


def test_a_step_depends_on_seed_and_number_alone() -> None:
    late = PLAN.step_rows(7)
    for field, again in zip(late, Plan(*PLAN).step_rows(7), strict=True):
        np.testing.assert_array_equal(field, again)
    assert late.counter.tolist() == list(range(2 * 21 + 8, 2 * 21 + 16))
    assert late.forget.tolist() != PLAN._replace(seed=1).step_rows(7).forget.tolist()


def test_random_responses_depend_on_the_row_counter_alone() -> None:
    by_counter = {}
    for batch_size in (8, 3):
        plan = PLAN._replace(batch_size=batch_size)
        for step in range(2 * plan.steps_per_epoch):
            rows = plan.step_rows(step)
            assert rows.random.shape == (len(rows.counter), 2)
            for counter, drawn in zip(rows.counter.tolist(), rows.random.tolist(), strict=True):
                assert by_counter.setdefault(counter, drawn) == drawn
    assert len({tuple(drawn) for drawn in by_counter.values()}) > 30


def test_normal_paces_when_there_is_no_forget_set() -> None:
    plan = Plan(seed=0, batch_size=4, forget=0, normal=10, pool=0, responses=0)
    rows = [plan.step_rows(step) for step in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate([r.normal for r in rows]).tolist()) == list(range(10))
    assert all(len(r.forget) == 0 and r.random.size == 0 for r in rows)


def test_purposes_draw_independently() -> None:
    numbers = [draw(0, purpose, 5).random() for purpose in ("random", "random-order", "labels")]
    assert len(set(numbers)) == 3


@pytest.mark.parametrize("size", [5, 64, 1000, 4097])
def test_computed_orders_are_permutations_and_differ_by_epoch(size: int) -> None:
    orders = [streams._scatter(0, "normal", epoch, size, np.arange(size)) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size >= 64:
        assert len({order.tobytes() for order in orders}) == 3
        assert 0.2 < np.mean(np.diff(orders[0]) > 0) < 0.8  # neither rising nor falling


def test_computed_orders_spread_rows_evenly() -> None:
    """A thousand orders of 100 rows: where row 0 stands is uniform (chi-square, 99 degrees of freedom, p > 1e-4)."""
    places = np.array([int(streams._scatter(0, "x", epoch, 100, np.arange(100))[0]) for epoch in range(5000)])
    counts = np.bincount(places, minlength=100)
    assert ((counts - 50) ** 2 / 50).sum() < 160


def test_a_huge_set_needs_no_table_of_its_order() -> None:
    plan = PLAN._replace(normal=10**12)
    rows = np.concatenate([plan.step_rows(step).normal for step in range(30)])
    assert len(set(rows.tolist())) == len(rows)
    assert rows.max() > 10**11


def test_the_rows_that_a_run_uses_are_known_before_it() -> None:
    for normal, steps in ((13, 2), (13, 9), (500, 5), (10**9, 7)):
        plan = PLAN._replace(normal=normal)
        used = np.concatenate([plan.step_rows(step).normal for step in range(steps)])
        assert plan.normal_rows(steps).tolist() == sorted(set(used.tolist()))


def test_a_restored_position_goes_on_with_the_identical_rows() -> None:
    straight = [PLAN.step_rows(step) for step in range(20)]
    for position in (1, 7, 19):
        later = [Plan(*json.loads(json.dumps(PLAN))).step_rows(step) for step in range(position, 20)]
        for a, b in zip(straight[position:], later, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

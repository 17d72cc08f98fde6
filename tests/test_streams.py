import numpy as np

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

"""The paired bootstrap: what it gives where the answer is known."""

import numpy as np
import pytest

from errors import InputError
from report.bootstrap import paired_interval


def runs(*keys, **datasets):
    return {key: {name: np.array(rows) for name, rows in datasets.items()} for key in keys}


def test_identical_answers_have_no_gap_and_no_width():
    answers = runs(("A", "1"), ("A", "2"), x=[1, 0, 1, 1], y=[0, 0, 1])
    found = paired_interval(answers, answers)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.is_significant


def test_a_gap_on_every_row_has_no_width():
    keys = [("A", "1"), ("A", "2"), ("B", "1"), ("B", "2")]
    found = paired_interval(runs(*keys, x=[1] * 5, y=[1] * 3), runs(*keys, x=[0] * 5, y=[0] * 3))
    assert (found.mean, found.low, found.high) == pytest.approx((100, 100, 100))
    assert (found.runs, found.seeds) == (4, 2) and found.is_significant


def test_one_seed_of_an_order_is_no_result():
    keys = [("A", "1"), ("A", "2"), ("B", "1")]
    found = paired_interval(runs(*keys, x=[1] * 5), runs(*keys, x=[0] * 5))
    assert not found.contains_zero and found.seeds == 1 and not found.is_significant


def test_datasets_count_alike_whatever_their_size():
    ours = runs(("A", "1"), large=[1] * 90, small=[0] * 10)
    theirs = runs(("A", "1"), large=[0] * 90, small=[0] * 10)
    assert paired_interval(ours, theirs).mean == pytest.approx(50)


def test_orders_count_alike_however_many_seeds_they_have():
    won, lost = {"x": np.ones(4)}, {"x": np.zeros(4)}
    ours = {("A", "1"): won, ("A", "2"): won, ("A", "3"): won, ("B", "1"): lost}
    assert paired_interval(ours, dict.fromkeys(ours, lost)).mean == pytest.approx(50)


def test_width_is_that_of_the_normal_approximation():
    random = np.random.default_rng(1)
    ours, theirs = random.random((2, 400)) < 0.5
    gap = ours.astype(float) - theirs
    found = paired_interval({("A", "1"): {"x": ours}}, {("A", "1"): {"x": theirs}}, resamples=4000)
    error = 100 * gap.std() / 400**0.5
    assert found.mean == pytest.approx(100 * gap.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_seeds_that_disagree_widen_it():
    won, lost = {"x": np.ones(50)}, {"x": np.zeros(50)}
    ours = {("A", "1"): won, ("A", "2"): lost}
    theirs = {("A", "1"): lost, ("A", "2"): won}
    found = paired_interval(ours, theirs)
    assert found.mean == 0
    assert (found.low, found.high) == (-100, 100)  # each row agrees with the others; only the seeds vary


def test_the_error_over_seeds_is_students():
    """Over examples alone there is none, so the width is that of Student's t: 4.303 at 3 seeds, with means over the
    two orders of 0.35, 0.4 and 0.45."""
    seeds = {("A", "1"): 0.2, ("A", "2"): 0.3, ("A", "3"): 0.4, ("B", "1"): 0.5, ("B", "2"): 0.5, ("B", "3"): 0.5}
    ours = {run: {"x": np.full(50, gap)} for run, gap in seeds.items()}
    found = paired_interval(ours, resamples=20_000)
    assert found.mean == pytest.approx(40)
    assert (found.high - found.low) / 2 == pytest.approx(4.303 * 100 * 0.05 / 3**0.5, rel=0.06)


def test_a_seed_that_errs_alike_in_both_orders_counts_once():
    one = {("A", str(seed)): {"x": np.full(50, gap)} for seed, gap in enumerate((0.2, 0.3, 0.4))}
    both = one | {("B", seed): answers for (_, seed), answers in one.items()}
    width = {name: found.high - found.low for name, found in
             {"one": paired_interval(one), "both": paired_interval(both)}.items()}  # fmt: skip
    assert width["both"] == pytest.approx(width["one"])
    apart = one | {("B", f"{seed} more"): answers for (_, seed), answers in one.items()}
    found = paired_interval(apart)
    assert found.high - found.low == pytest.approx(width["one"] / 2**0.5, rel=0.01)


@pytest.mark.parametrize("orders, seeds, shared", [(1, 2, 0), (1, 3, 0), (2, 3, 0), (2, 3, 0.05)])
def test_methods_that_differ_by_their_seeds_alone_are_seldom_called_different(orders, seeds, shared):
    """`shared`: the deviation that a seed has in all orders, besides that of each run."""
    random = np.random.default_rng(3)

    def answers() -> dict:
        of_seed = random.normal(0, shared, seeds)
        share = {(str(order), str(seed)): 0.5 + of_seed[seed] + random.normal(0, 0.05)
                 for order in range(orders) for seed in range(seeds)}  # fmt: skip
        return {run: {"x": (random.random(400) < share[run]) * 1.0} for run in share}

    called = 0
    for trial in range(200):
        ours, theirs = answers(), answers()
        called += paired_interval(ours, theirs, resamples=300, seed=trial).is_significant
    assert called <= 20


def test_the_sign_of_a_gap_does_not_matter():
    random = np.random.default_rng(4)
    ours, theirs = ({("A", str(seed)): {"x": (random.random(50) < 0.5).astype(float)} for seed in range(3)}
                    for _ in range(2))  # fmt: skip
    one, other = paired_interval(ours, theirs), paired_interval(theirs, ours)
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))


def test_a_methods_own_performance_is_not_below_0():
    ours = {("A", "1"): {"x": np.array([0.0, 0.1])}, ("A", "2"): {"x": np.array([0.5, 0.4])}}
    assert (paired_interval(ours).low, paired_interval(ours).high) == (0, 100)


def test_a_dataset_may_have_other_examples_in_another_order():
    ours = {("A", "1"): {"x": np.ones(10)}, ("B", "1"): {"x": np.ones(20)}}
    theirs = {("A", "1"): {"x": np.zeros(10)}, ("B", "1"): {"x": np.repeat([0.0, 1.0], 10)}}
    assert paired_interval(ours, theirs).mean == pytest.approx(75)


def test_a_coverage_of_95_percent():
    random = np.random.default_rng(2)
    held = 0
    for trial in range(100):
        ours, theirs = random.random((2, 200)) < [[0.6], [0.5]]
        found = paired_interval({("A", "1"): {"x": ours}}, {("A", "1"): {"x": theirs}}, resamples=500, seed=trial)
        held += found.low <= 10 <= found.high
    assert 88 <= held <= 100


def test_only_common_runs_count_and_there_must_be_one():
    ours = runs(("A", "1"), ("A", "2"), x=[1, 1])
    theirs = runs(("A", "1"), x=[0, 1])
    assert paired_interval(ours, theirs).mean == pytest.approx(50)
    with pytest.raises(InputError, match="no run of the same order and seed"):
        paired_interval(ours, runs(("B", "1"), x=[1, 1]))


def test_other_rows_are_refused():
    with pytest.raises(InputError, match="order A, seed 1"):
        paired_interval(runs(("A", "1"), x=[1, 1]), runs(("A", "1"), x=[1]))

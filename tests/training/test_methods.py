from fractions import Fraction

import pytest

from tic_clip.training.methods import METHODS

SIZES = [100, 60, 80, 40]  # new samples of four steps
ALL = [[100], [100, 60], [100, 60, 80], [100, 60, 80, 40]]
NEW = [[100], [0, 60], [0, 0, 80], [0, 0, 0, 40]]


def used(name, replay=1):
    return [METHODS[name].data(SIZES[: t + 1], Fraction(str(replay))) for t in range(4)]


@pytest.mark.parametrize(
    ("name", "replay", "expected"),
    [
        *((name, 1, ALL) for name in ("oracle", "cumulative", "restart", "averaging")),
        *((name, 1, NEW) for name in ("sequential", "patching", "lwf", "ewc")),
        # D new and D old: at step 3 D/2, D/2; at step 4 D/2, D/4, D/4, the newest first.
        ("cumulative-exp", 1, [[100], [60, 60], [40, 40, 80], [10, 10, 20, 40]]),
        ("cumulative-exp", 0.5, [[100], [30, 60], [20, 20, 80], [5, 5, 10, 40]]),
        ("cumulative-equal", 1, [[100], [60, 60], [40, 40, 80], [14, 13, 13, 40]]),  # 40 samples among three
        ("cumulative-equal", 1.5, [[100], [90, 60], [60, 60, 80], [20, 20, 20, 40]]),
        *((name, 100, ALL) for name in ("cumulative-exp", "cumulative-equal")),
        *((name, 0, NEW) for name in ("cumulative-exp", "cumulative-equal")),
    ],
)
def test_what_a_method_uses(name, replay, expected):
    assert used(name, replay) == expected


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("cumulative-equal", [100, 10, 100], [90, 10, 100]),
        ("cumulative-equal", [100, 10, 100, 101], [46, 10, 45, 101]),
        ("cumulative-exp", [200, 200, 20, 100], [40, 40, 20, 100]),
        ("cumulative-exp", [30, 200, 20, 100], [30, 50, 20, 100]),
    ],
)
def test_a_step_smaller_than_its_share_gives_all_and_the_others_the_rest(name, sizes, expected):
    assert METHODS[name].data(sizes, Fraction(1)) == expected


def test_two_methods_replay():
    different = {name for name in METHODS if used(name, 0) != used(name, 1)}
    assert different == {name for name, method in METHODS.items() if method.has_replay}

from fractions import Fraction

import pytest

from tic_clip import TicError
from tic_clip.training.methods import METHODS, get_method

SIZES = [100, 60, 80, 40]  # new samples of four steps


def used(name, buffer=1):
    return [get_method(name).data(SIZES[: t + 1], Fraction(str(buffer))) for t in range(4)]


@pytest.mark.parametrize(
    ("name", "start", "spent"),
    [
        ("oracle", [None, None, None, None], [1, 2, 3, 4]),
        ("cumulative", [None, 0, 1, 2], [1, 1, 1, 1]),
        ("cumulative-exp", [None, 0, 1, 2], [1, 1, 1, 1]),
        ("cumulative-equal", [None, 0, 1, 2], [1, 1, 1, 1]),
        ("sequential", [None, 0, 1, 2], [1, 1, 1, 1]),
        ("restart", [None, None, None, None], [1, 1, 1, 1]),
        ("patching", [None, 0, 1, 2], [1, 1, 1, 1]),
        ("lwf", [None, 0, 1, 2], [1, 1, 1, 1]),
    ],
)
def test_what_a_method_starts_from_and_spends(name, start, spent):
    method = get_method(name)
    assert [method.starts_from(t) for t in range(4)] == start
    assert [method.budget_of(t) for t in range(4)] == spent


@pytest.mark.parametrize("name", ["oracle", "cumulative", "restart"])
def test_all_data(name):
    assert used(name) == [[100], [100, 60], [100, 60, 80], [100, 60, 80, 40]]


@pytest.mark.parametrize("name", ["sequential", "patching", "lwf"])
def test_new_data(name):
    assert used(name) == [[100], [0, 60], [0, 0, 80], [0, 0, 0, 40]]


def test_the_exponential_buffer_is_halved_with_each_step_back():
    """D new and D old: at step 3 D/2, D/2; at step 4 D/2, D/4, D/4, the newest first."""
    assert used("cumulative-exp") == [[100], [60, 60], [40, 40, 80], [10, 10, 20, 40]]
    assert used("cumulative-exp", 0.5) == [[100], [30, 60], [20, 20, 80], [5, 5, 10, 40]]


def test_the_equal_buffer_has_equal_shares_of_every_earlier_step():
    assert used("cumulative-equal") == [[100], [60, 60], [40, 40, 80], [14, 13, 13, 40]]  # 40 samples among three
    assert used("cumulative-equal", 1.5) == [[100], [90, 60], [60, 60, 80], [20, 20, 20, 40]]


@pytest.mark.parametrize("name", ["cumulative-exp", "cumulative-equal"])
def test_a_buffer_with_room_for_all_old_data_holds_them_and_an_empty_one_nothing(name):
    assert used(name, 100) == used("cumulative")
    assert used(name, 0) == used("sequential")


def test_a_buffer_that_one_step_cannot_fill_is_refused_with_the_numbers():
    with pytest.raises(TicError, match=r"a buffer of 100 samples would hold 50 of step 2, which has 10"):
        get_method("cumulative-equal").data([100, 10, 100], Fraction(1))


def test_only_the_two_methods_with_a_buffer_look_at_its_size():
    different = {name for name in METHODS if used(name, 0) != used(name, 1)}
    assert different == {name for name, method in METHODS.items() if method.has_buffer}
    assert different == {"cumulative-exp", "cumulative-equal"}


def test_a_method_is_found_by_its_name():
    assert all(get_method(name).name == name for name in METHODS)
    assert len(METHODS) == 8


def test_an_unknown_method_lists_the_valid_ones():
    with pytest.raises(TicError, match=r"'replay'.*cumulative, cumulative-exp, cumulative-equal, sequential, restart"):
        get_method("replay")

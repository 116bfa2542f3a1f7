import pytest

from tic_clip import TicError
from tic_clip.methods import METHODS, get_method


@pytest.mark.parametrize(
    ("name", "data", "start", "spent"),
    [
        ("cumulative", [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]], [None, 0, 1, 2], [10, 10, 10, 10]),
        ("sequential", [[0], [1], [2], [3]], [None, 0, 1, 2], [10, 10, 10, 10]),
        ("oracle", [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]], [None, None, None, None], [10, 20, 30, 40]),
    ],
)
def test_what_a_method_trains_on_starts_from_and_spends(name, data, start, spent):
    method = get_method(name)
    assert [list(method.steps(t)) for t in range(4)] == data
    assert [method.starts_from(t) for t in range(4)] == start
    assert [method.samples(t, samples_per_step=10) for t in range(4)] == spent


def test_a_method_is_found_by_its_name():
    assert all(get_method(name).name == name for name in METHODS)


def test_an_unknown_method_lists_the_valid_ones():
    with pytest.raises(TicError, match=r"'replay'.*cumulative, sequential, oracle"):
        get_method("replay")

"""The learning rate of each iteration, against answers worked out by hand and OpenCLIP's own schedules."""

from types import SimpleNamespace

import pytest

from tic_clip.training import hooks
from tic_clip.training.schedule import SCHEDULES, branch_point, cooldown_blocks, learning_rate

PLAN = {"learning_rate": 1.0, "iterations": 20, "warmup": 4, "run_warmup": 4, "cooldown": 5, "trunk": 0}
LATER = {"warmup": 0, "trunk": 15}  # of a second step: the first one went on for 15 iterations before its cool-down


@pytest.mark.parametrize(
    ("schedule", "changes", "rates"),
    [
        ("cosine", {"cooldown": 0, "warmup": 40, "run_warmup": 40}, {0: 0.025, 19: 0.5}),  # longer than the step
        ("const", {"cooldown": 0}, {0: 0.25, 4: 1, 19: 1}),
        ("wsd", {}, {0: 0.25, 3: 1, 14: 1, 16: 0.8, 19: 0.2}),
        ("wsd", LATER, {0: 1, 14: 1, 16: 0.8}),
        ("rsqrt", {}, {0: 0.25, 3: 1, 4: 1, 9: 2 / 3, 16: 0.5 * 0.8}),
        ("rsqrt", LATER, {1: 0.5, 10: 0.4}),  # √(4/16), √(4/25)
        ("rsqrt", LATER | {"warmup": 1}, {0: 0.5, 1: 0.5}),  # warmed up again: to the rate of its place
        ("rsqrt", {"warmup": 0, "run_warmup": 0, "cooldown": 0}, {0: 1, 3: 0.5, 15: 0.25}),
    ],
)
def test_the_learning_rate(schedule, changes, rates):
    plan = PLAN | {"schedule": schedule} | changes
    assert {i: learning_rate(plan, i) for i in rates} == pytest.approx(rates)


def test_cosine_and_const_cooldown_are_those_of_openclip():
    from training.scheduler import const_lr_cooldown, cosine_lr

    peer = SimpleNamespace(param_groups=[{}])
    stock = {"cosine": cosine_lr(peer, 5e-4, 500, 4500)}
    stock["const-cooldown"] = const_lr_cooldown(peer, 5e-4, 500, 4500, 900)
    for name, adjust in stock.items():
        plan = {"learning_rate": 5e-4, "iterations": 4500, "warmup": 500, "schedule": name}
        plan["cooldown"] = 900 if name == "const-cooldown" else 0
        ours = [learning_rate(plan, i) for i in range(4500)]
        assert ours == pytest.approx([float(adjust(i)) for i in range(4500)], rel=1e-15)
    del plan["schedule"]  # as plans from before there were schedules
    assert learning_rate(plan | {"cooldown": 0}, 2500) == float(stock["cosine"](2500))


def test_openclip_gets_the_rate_of_the_plan():
    optimizer = SimpleNamespace(param_groups=[{}, {}])
    keeper = SimpleNamespace(plan=PLAN | {"schedule": "wsd"})
    hooks.scheduler(None, optimizer, SimpleNamespace(tic=keeper))(16)
    assert [group["lr"] for group in optimizer.param_groups] == [0.8, 0.8]
    assert hooks.scheduler("stock", optimizer, SimpleNamespace()) == "stock"


def test_a_cool_down_is_of_whole_blocks():
    cases = {(0.2, 15): 3, (0.2, 6): 1, (0.01, 6): 1, (0.99, 6): 5, (0.5, 2): 1, (0, 6): 0}
    assert {case: cooldown_blocks(*case) for case in cases} == cases


def test_where_the_next_step_goes_on():
    points = {name: branch_point(PLAN | {"schedule": name}) for name in SCHEDULES}
    assert points == {"cosine": None, "const": None, "const-cooldown": None, "wsd": 15, "rsqrt": 15}
    assert branch_point(PLAN | {"schedule": "wsd", "cooldown": 0}) is None

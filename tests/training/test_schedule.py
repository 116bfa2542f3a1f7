"""The learning rate of each iteration, against answers worked out by hand and OpenCLIP's own schedules."""

import re
from dataclasses import fields
from types import SimpleNamespace

import pytest

from tic_clip.training import hooks
from tic_clip.training.config import Config
from tic_clip.training.schedule import SCHEDULES, branch_point, cooldown_blocks, learning_rate

PLAN = {"learning_rate": 1.0, "iterations": 20, "warmup": 4, "run_warmup": 4, "cooldown": 5, "trunk": 0}
LATER = {"warmup": 0, "trunk": 15}  # of a second step: the first one went on for 15 iterations before its cool-down


@pytest.mark.parametrize(
    ("schedule", "changes", "rates"),
    [
        ("cosine", {"cooldown": 0}, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 12: 0.5, 19: 0.0096073598}),
        ("cosine", {"cooldown": 0, "warmup": 0, "run_warmup": 0}, {0: 1, 10: 0.5}),
        ("cosine", {"cooldown": 0, "warmup": 40, "run_warmup": 40}, {0: 0.025, 19: 0.5}),  # longer than the step
        ("const-cooldown", {}, {0: 0.25, 3: 1, 14: 1, 15: 1, 16: 0.8, 17: 0.6, 19: 0.2}),
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
    old = {"learning_rate": 5e-4, "iterations": 4500, "warmup": 500}  # a plan of before there were schedules
    assert [learning_rate(old, i) for i in range(4500)] == [float(stock["cosine"](i)) for i in range(4500)]


def test_openclip_gets_the_rate_of_the_plan():
    optimizer = SimpleNamespace(param_groups=[{}, {}])
    keeper = SimpleNamespace(plan=PLAN | {"schedule": "wsd"})
    hooks.scheduler(None, optimizer, SimpleNamespace(tic=keeper))(16)
    assert [group["lr"] for group in optimizer.param_groups] == [0.8, 0.8]
    assert hooks.scheduler("stock", optimizer, SimpleNamespace()) == "stock"


@pytest.mark.parametrize(
    ("share", "blocks", "found"), [(0.2, 15, 3), (0.2, 6, 1), (0.01, 6, 1), (0.99, 6, 5), (0.5, 2, 1), (0, 6, 0)]
)
def test_a_cool_down_is_of_whole_blocks(share, blocks, found):
    assert cooldown_blocks(share, blocks) == found


def test_the_flag_names_every_schedule():
    help_text = next(each.metadata["help"] for each in fields(Config) if each.name == "schedule")
    assert re.findall(r"[a-z-]+", help_text.partition(": ")[2].partition(" (")[0].replace(" or ", ", ")) == [*SCHEDULES]


def test_where_the_next_step_goes_on():
    points = {name: branch_point(PLAN | {"schedule": name}) for name in SCHEDULES}
    assert points == {"cosine": None, "const": None, "const-cooldown": None, "wsd": 15, "rsqrt": 15}
    assert branch_point(PLAN | {"schedule": "wsd", "cooldown": 0}) is None

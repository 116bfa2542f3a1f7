"""The plan of a step, from tables of sizes alone."""

import json
import sys
from pathlib import Path

import pytest

from tic_clip import TicError
from tic_clip.data.split import read_sizes
from tic_clip.runs import run_name
from tic_clip.storage import write_json
from tic_clip.training import plan as plans
from tic_clip.training.plan import (
    Request,
    blocks_of,
    check_run,
    check_same,
    describe,
    difference,
    make_plan,
    parse_budget,
    steps_of,
)

SIZES = {"2014": 300, "2015": 100, "2016": 100, "2017-2018": 500}


def fake_split(folder, size):
    write_json(folder / "sizes.json", {"00000000.tar": size})


@pytest.fixture
def fake_data(tmp_path):
    """Tables without shards: all that a plan looks at."""
    for step, size in SIZES.items():
        fake_split(tmp_path / "data/tic/emoji/yearly/train" / step, size)
    return str(tmp_path / "data")


def request(fake_data, **changes):
    settings = {"benchmark": "emoji", "method": "cumulative", "scale": "tic_tiny", "step": "2016"}
    return Request(**{**settings, "data_dir": fake_data, "output_dir": "out", "samples_per_step": 1280, **changes})


def test_cumulative_reads_all_data_so_far_by_size(fake_data):
    plan = make_plan(request(fake_data))
    assert [(s["name"], s["size"], s["samples"]) for s in plan["sources"]] == [
        ("2014", 300, 768),
        ("2015", 100, 256),
        ("2016", 100, 256),
    ]
    assert plan["sources"][0]["repeats"] == 2.56
    assert plan["start"] == "out/2015/checkpoints/epoch_2.pt"
    assert (plan["samples"], plan["iterations"], plan["samples_seen"], plan["warmup"]) == (1280, 20, 3840, 15)


def test_another_batch(fake_data):
    plan = make_plan(request(fake_data, batch_size=128))
    assert (plan["batch_size"], plan["iterations"], plan["samples"], plan["samples_seen"]) == (128, 10, 1280, 3840)
    with pytest.raises(TicError, match=r"2 checkpoints × a batch of 1024 = 2048"):
        make_plan(request(fake_data, batch_size=1024))
    with pytest.raises(TicError, match="batch of 30 does not divide among 4 processes"):
        make_plan(request(fake_data, batch_size=30), world_size=4)


def test_sequential_reads_the_new_data(fake_data):
    plan = make_plan(request(fake_data, method="sequential"))
    assert [(s["name"], s["samples"]) for s in plan["sources"]] == [("2016", 1280)]
    assert plan["start"] == "out/2015/checkpoints/epoch_2.pt"


def test_oracle_starts_anew_and_spends_more(fake_data):
    plan = make_plan(request(fake_data, method="oracle"))
    assert [s["samples"] for s in plan["sources"]] == [2304, 768, 768]
    assert (plan["start"], plan["samples"], plan["warmup"]) == (None, 3840, 30)
    assert plan["samples_seen"] == (1 + 2 + 3) * 1280  # of the whole run: this step's model and the two before it


def test_the_first_step_starts_from_random_weights(fake_data):
    plan = make_plan(request(fake_data, step="2014"))
    assert (plan["start"], plan["warmup"], plan["samples_seen"]) == (None, 30, 1280)


def test_a_budget_is_rounded_down_to_whole_batches_for_each_checkpoint(fake_data):
    assert make_plan(request(fake_data, samples_per_step=1400))["samples"] == 1280
    with pytest.raises(TicError, match="a step of 127 samples is less than 2 checkpoints × a batch of 64 = 128"):
        make_plan(request(fake_data, samples_per_step=127))


def test_merged_years_are_sources_of_their_own(tmp_path):
    for year in ("2014", "2015", "2016"):
        fake_split(tmp_path / "tic/datacomp/yearly/train" / year, 1000)
    plan = make_plan(
        request(str(tmp_path), benchmark="datacomp", scale="tic_medium", step="2014-2016", samples_per_step=None)
    )
    assert [s["name"] for s in plan["sources"]] == ["2014", "2015", "2016"]
    assert plan["model"] == "ViT-B-16"


def test_parts_of_a_split_are_one_source(tmp_path):
    for part in ("00", "01"):
        fake_split(tmp_path / "tic/yfcc15m/yearly/train/2004-2008" / part, 40)
    plan = make_plan(request(str(tmp_path), benchmark="yfcc15m", step="2004-2008"))
    assert [(s["name"], s["size"]) for s in plan["sources"]] == [("2004-2008", 80)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; the methods are oracle, cumulative, cumulative-exp"),
        ({"scale": "tic_huge"}, "unknown scale 'tic_huge'; the scales are tic_tiny, tic_debug"),
        ({"step": "1999"}, "unknown step '1999' of emoji; the steps are 2014, 2015, 2016"),
        ({"benchmark": "laion"}, "unknown benchmark 'laion'; the benchmarks are datacomp"),
        ({"data_dir": "nowhere"}, "nowhere/tic/emoji/yearly/train/2014 is missing"),
        ({"step": "2019"}, "train/2019 is missing"),
    ],
)
def test_bad_requests_are_refused(fake_data, change, message):
    with pytest.raises(TicError, match=message):
        make_plan(request(fake_data, **change))


def test_a_split_without_sizes_is_named(fake_data):
    (Path(fake_data) / "tic/emoji/yearly/train/2015/sizes.json").unlink()
    with pytest.raises(TicError, match=r"train/2015 has no sizes.json"):
        make_plan(request(fake_data))


def test_a_step_can_be_gone_on_with_under_the_same_plan_only(fake_data):
    plan = make_plan(request(fake_data))
    check_same({**plan, "command": ["other"], "pins": {}}, plan, Path("out/2016"))
    with pytest.raises(TicError, match="out/2016 was begun with seed 0, now it is 1"):
        check_same(plan, make_plan(request(fake_data, seed=1)), Path("out/2016"))
    other = {**plan, "sources": [{**source, "size": 1} for source in plan["sources"]]}
    with pytest.raises(TicError, match=r"was begun with sources {'2014': '768 of 300 of 1'"):
        check_same(other, plan, Path("out/2016"))


@pytest.mark.parametrize("old", [{}, [], None])
def test_a_damaged_plan_is_named(fake_data, old):
    with pytest.raises(TicError, match=r"out/2016/plan.json is damaged"):
        check_same(old, make_plan(request(fake_data)), Path("out/2016"))


def test_a_run_and_its_data_can_be_moved(fake_data, tmp_path):
    before = make_plan(request(fake_data))
    (tmp_path / "data").rename(tmp_path / "moved")
    check_same(before, make_plan(request(str(tmp_path / "moved"), output_dir="/else/where")), Path("out/2016"))


def test_the_plan_as_text(fake_data, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--step", "all", "--seed", "0", "--dry_run"])
    monkeypatch.setenv("LAUNCH", "torchrun --nproc-per-node 2")
    plan = {**make_plan(request(fake_data)), "macs": 1234, "macs_seen": 5.6e12}
    assert describe(plan).splitlines() == [
        "2016: cumulative at tic_tiny, ViT-Tiny-8-48 from out/2015/checkpoints/epoch_2.pt, exact sampling",
        "  1,280 samples = 20 × 64, 2 checkpoints, warm-up 15, fresh optimizer, seed 0; 3,840 samples seen after it",
        "  1.23e+03 MACs, 5.60e+12 after it",
        "  2014: 60.0%, 768 samples of 300 (2.56 each)",
        "  2015: 20.0%, 256 samples of 100 (2.56 each)",
        "  2016: 20.0%, 256 samples of 100 (2.56 each)",
        "  torchrun --nproc-per-node 2 scripts/train.py --step 2016 --seed 0",
    ]


def shares(plan):
    return {source["name"]: (source["samples"], source["used"]) for source in plan["sources"]}


def test_a_buffer_is_a_part_of_the_old_data_read_as_often_as_the_new(fake_data):
    plan = make_plan(request(fake_data, method="cumulative-exp", buffer=0.5))
    assert shares(plan) == {"2014": (214, 25), "2015": (213, 25), "2016": (853, 100)}  # 1280 among 25, 25 and 100
    assert [source["repeats"] for source in plan["sources"]] == [8.56, 8.52, 8.53]
    assert plan["buffer"] == 0.5
    assert "  a buffer of 0.5 D of old data, new data not counted" in describe(plan)
    assert "  2014: 16.7%, 214 samples of 25 of 300 (8.56 each)" in describe(plan)
    other = make_plan(request(fake_data, method="cumulative-exp", buffer=0.4))
    assert difference(plan, other).startswith("sources {'2014': '214 of 25 of 300'")


def test_sampling_with_replacement_draws_whole_shards_so_a_buffer_is_a_share(fake_data):
    plan = make_plan(request(fake_data, method="cumulative-equal", buffer=0.5, resampled=True, workers=0))
    assert shares(plan) == {"2014": (214, 300), "2015": (213, 100), "2016": (853, 100)}
    assert "  a buffer of 0.5 D as the share of all old data, new data not counted" in describe(plan)


def test_the_budget_of_each_step(fake_data):
    budget = (1, 0.5, 2, 1, 1, 1, 1)
    plan = make_plan(request(fake_data, budget=budget))
    assert (plan["samples"], plan["samples_seen"]) == (2560, 1280 + 640 + 2560)
    oracle = make_plan(request(fake_data, method="oracle", budget=budget))
    assert (oracle["samples"], oracle["samples_seen"]) == (2560, 1280 + 640 + 2560)  # instead of t · C


def test_a_budget_as_text():
    assert parse_budget("1,1, 1.5,2") == (1, 1, 1.5, 2)
    for text in ("1,,2", "a", "", "nan", "1/0", "1e400"):
        with pytest.raises(TicError, match="is no list of numbers"):
            parse_budget(text)


def test_the_users_shares(fake_data, tmp_path):
    weights = tmp_path / "weights.json"
    write_json(weights, {"2015": {"2014": 0.25, "2015": 0.75}, "2016": {"2014": 0.1, "2016": 0.9}})
    settings = {"weights": str(weights), "method": "sequential"}
    assert shares(make_plan(request(fake_data, **settings, step="2015"))) == {"2014": (320, 300), "2015": (960, 100)}
    assert shares(make_plan(request(fake_data, **settings))) == {"2014": (128, 300), "2016": (1152, 100)}
    assert shares(make_plan(request(fake_data, **settings, step="2014"))) == {"2014": (1280, 300)}  # the method's own


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"2016": {"2014": 0.25, "2016": 0.5}}, r"the shares of step 2016 sum to 0.75"),
        ({"2016": {"1999": 1}}, r"1999 is no data of step 2016; those are 2014, 2015, 2016"),
        ({"2016": {"2019": 1}}, r"2019 is no data of step 2016"),
        ({"2016": {"2016": "all"}}, r"the share of 2016 is 'all'"),
        ({"2016": {"2014": -1, "2016": 2}}, r"the share of 2014 is -1"),
        ({"soon": {"2016": 1}}, r"unknown step 'soon'"),
        ({"2016": 1}, r"must be {\"step\": {\"split\": share"),
    ],
)
def test_shares_that_cannot_be_are_refused(fake_data, tmp_path, table, message):
    write_json(tmp_path / "weights.json", table)
    with pytest.raises(TicError, match=message):
        make_plan(request(fake_data, weights=str(tmp_path / "weights.json")))


def test_a_model_from_elsewhere_takes_the_place_of_random_weights(fake_data, tmp_path):
    init = tmp_path / "2015.pt"
    init.touch()
    settings = {"init": str(init), "first_step": "2016"}
    plan = make_plan(request(fake_data, **settings))
    assert (plan["start"], plan["warmup"], plan["samples_seen"]) == (str(init), 15, 1280)
    assert [source["name"] for source in plan["sources"]] == ["2014", "2015", "2016"]
    later = make_plan(request(fake_data, **settings, step="2017-2018"))
    assert (later["start"], later["samples_seen"]) == ("out/2016/checkpoints/epoch_2.pt", 2560)
    again = make_plan(request(fake_data, **settings, step="2017-2018", method="restart"))
    assert again["start"] == str(init)
    assert steps_of(request(fake_data, **settings))[0] == "2016"
    lwf = make_plan(request(fake_data, **settings, step="2017-2018", method="lwf"))
    assert (lwf["samples_seen"], lwf["samples_distilled"]) == (2560, 2560)


def test_distillation_from_the_last_model(fake_data):
    plan = make_plan(request(fake_data, method="lwf"))
    assert plan["teacher"] == plan["start"] == "out/2015/checkpoints/epoch_2.pt"
    assert (plan["samples_seen"], plan["samples_distilled"]) == (3840, 2560)
    first = make_plan(request(fake_data, method="lwf", step="2014"))
    assert (first["teacher"], first["samples_distilled"]) == (None, 0)


def test_patching_holds_out_a_twentieth_of_every_step_to_choose_on(fake_data):
    plan = make_plan(request(fake_data, method="patching"))
    assert shares(plan) == {"2016": (1280, 95)}
    assert plan["start"] == "out/2015/checkpoints/patched.pt"
    assert [(entry["name"], entry["held_out"]) for entry in plan["validation"]] == [("2014", 15), ("2015", 5)]
    assert "  patched with coefficient chosen on 15 of 2014, 5 of 2015" in describe(plan)
    fixed = make_plan(request(fake_data, method="patching", coefficient=0.5))
    assert shares(fixed) == {"2016": (1280, 100)}
    assert (fixed["coefficient"], "validation" in fixed) == (0.5, False)
    assert plans.difference(plan, fixed) is not None


def test_data_too_small_to_hold_any_out_are_refused_before_training(fake_data):
    for step in ("2014", "2015"):
        fake_split(Path(fake_data) / "tic/emoji/yearly/train" / step, 19)
    read_sizes.cache_clear()
    with pytest.raises(TicError, match=r"a twentieth .*; of 19 of 2014, 19 of 2015: give a --coefficient"):
        make_plan(request(fake_data, method="patching"))
    assert make_plan(request(fake_data, method="patching", coefficient=0.5))["coefficient"] == 0.5


@pytest.mark.parametrize("name", ["scripts", "released", "kept"])
def test_a_policy_is_for_the_steps_after_the_first(fake_data, name):
    wanted = {"scripts": (0, "fresh"), "released": (2000, "fresh"), "kept": (0, "kept")}[name]
    plan = make_plan(request(fake_data, policy=name))
    assert (plan["warmup"], plan["optimizer"]) == wanted
    assert ("warm-up 2000 (longer than the step)" in describe(plan)) == (name == "released")
    first = make_plan(request(fake_data, policy=name, step="2014"))
    assert (first["warmup"], first["optimizer"]) == (30, "fresh")


def test_filters_are_folders(tmp_path):
    for folder, size in (("train", 1000), ("train_bestpool", 10)):
        for year in ("2014", "2015", "2016"):
            fake_split(tmp_path / "tic/datacomp/yearly" / folder / year, size)
    wanted = {"benchmark": "datacomp", "scale": "tic_medium", "step": "2014-2016", "samples_per_step": None}
    for name, size in (("basic", 1000), ("bestpool", 10), (None, 1000)):
        plan = make_plan(request(str(tmp_path), filter=name, **wanted))
        assert {source["size"] for source in plan["sources"]} == {size}
        assert run_name(plan) == f"datacomp-tic_medium-{name or 'basic'}-cumulative-2014-2016"
    with pytest.raises(TicError, match="unknown filter 'best'; the filters are basic, bestpool"):
        make_plan(request(str(tmp_path), filter="best", **wanted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": (1, 2)}, r"--budget has 2 numbers, emoji has 7 steps"),
        ({"budget": (1, 1, 0, 1, 1, 1, 1)}, r"--budget 1,1,0,1,1,1,1: each number must be more than 0"),
        ({"budget": (1, 1, 0.05, 1, 1, 1, 1)}, r"a step of 64 samples is less than 2 checkpoints"),
        ({"buffer": 1}, r"cumulative has no buffer"),
        ({"method": "cumulative-exp", "buffer": -1}, r"--buffer is -1"),
        ({"method": "cumulative-exp", "buffer": 1, "weights": "x"}, r"give one of them"),
        ({"method": "cumulative-equal", "buffer": 0.9, "step": "2017-2018"}, r"would hold \d+ of step \d, which has"),
        ({"coefficient": 0.5}, r"--coefficient is of patching"),
        ({"method": "patching", "coefficient": 1.5}, r"must be from 0 to 1"),
        ({"method": "patching", "resampled": True}, r"give a --coefficient, or sample exactly"),
        ({"init": "/nowhere/2016.pt"}, r"--init /nowhere/2016.pt is missing"),
        ({"report_to": "paper"}, r"--report_to is paper: it must be tensorboard, wandb or tensorboard,wandb"),
        ({"method": "patching", "policy": "kept"}, r"a patched model has no optimizer"),
        ({"remote": "s3://"}, r"s3:// is neither a local path"),
        ({"remote": "ftp://x/y"}, r"ftp://x/y is neither a local path"),
        ({"output_dir": "s3://b/run"}, r"a run writes to a local folder; --remote s3://b/run gets copies"),
        ({"first_step": "2016"}, r"--first_step 2016 needs --init"),
        ({"method": "restart", "first_step": "2019"}, r"step 2016 is before the first step to train, 2019"),
        ({"policy": "warm"}, r"unknown policy 'warm'; the policies are"),
        ({"batch_size": 0}, r"--batch_size is 0: it must be more than 0"),
        ({"batch_size": -64}, r"--batch_size is -64: it must be more than 0"),
        ({"samples_per_step": 0}, r"--samples_per_step is 0: it must be more than 0"),
        ({"max_kept": 0}, r"--max_kept is 0"),
        ({"save_every": -5}, r"--save_every is -5"),
        ({"save_minutes": float("nan")}, r"--save_minutes is nan"),
        (
            {"resampled": True, "workers": 30},
            r"10 batches a checkpoint are less than one for each of 30 loader workers",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_numbers(fake_data, change, message):
    with pytest.raises(TicError, match=message):
        make_plan(request(fake_data, **change))


@pytest.mark.parametrize(
    ("interval", "wanted", "multiple", "found"),
    [
        (60, 20, 1, (3, 20)),
        (900, 300, 4, (3, 300)),
        (5, 20, 1, (1, 5)),
        (151, 20, 1, (6, 25)),  # a prime: one iteration is lost rather than eleven
        (10, 20, 4, (1, 8)),
        (100, 1, 1, (100, 1)),
    ],
)
def test_blocks_fill_an_interval(interval, wanted, multiple, found):
    assert blocks_of(interval, wanted, multiple) == found
    number, size = found
    assert number * size <= interval


def test_a_step_goes_on_from_a_step_of_its_own_run_only(fake_data):
    before = make_plan(request(fake_data, step="2015"))
    check_run(before, make_plan(request(fake_data)))
    for change, message in (
        ({"seed": 1}, r"2016 goes on from 2015, which was trained with seed 0, now it is 1"),
        ({"method": "lwf"}, r"with method cumulative, now it is lwf"),
        ({"samples_per_step": 640}, r"after which 2,560 samples had been seen; these settings give 1,280"),
    ):
        with pytest.raises(TicError, match=message):
            check_run(before, make_plan(request(fake_data, **change)))
    fixed = make_plan(request(fake_data, method="patching", coefficient=0.5, step="2015"))
    with pytest.raises(TicError, match=r"with coefficient 0.5, now it is chosen"):
        check_run(fixed, make_plan(request(fake_data, method="patching")))


def test_another_model_to_start_from_is_another_plan(fake_data, tmp_path):
    """Of the same name, and in torch's old format, which is no zip."""
    import torch

    plans_of = {}
    for run, old in (("a", False), ("b", False), ("c", True), ("d", True)):
        path = tmp_path / run / "2014/checkpoints/epoch_2.pt"
        path.parent.mkdir(parents=True)
        state = {"w": torch.full((3,), float(ord(run)))}
        torch.save(state, path, _use_new_zipfile_serialization=not old)
        plans_of[run] = make_plan(request(fake_data, init=str(path), first_step="2016"))
    assert difference(plans_of["a"], plans_of["b"]).startswith("start_content ")
    assert difference(plans_of["c"], plans_of["d"]).startswith("start_content ")
    again = make_plan(request(fake_data, init=str(tmp_path / "a/2014/checkpoints/epoch_2.pt"), first_step="2016"))
    assert difference(plans_of["a"], again) is None
    assert difference(plans_of["a"], {**again, "start_content": None}) is None  # no longer there: the step is done


def test_what_changes_nothing_in_the_model_is_no_other_plan(fake_data):
    plan = make_plan(request(fake_data))
    other = {
        "max_kept": 1,
        "save_every": 640,
        "save_minutes": 1,
        "remote": "s3://x/y",
        "report_to": "wandb",
        "workers": 1,
    }
    assert difference(plan, make_plan(request(fake_data, **other))) is None


def test_a_plan_is_json(fake_data):
    for method in ("patching", "lwf", "cumulative-exp"):
        plan = make_plan(request(fake_data, method=method))
        assert json.loads(json.dumps(plan)) == plan

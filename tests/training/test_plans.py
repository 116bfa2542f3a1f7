"""The plan of a step, from tables of sizes alone, against answers worked out by hand."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from tic_clip import TicError, weights
from tic_clip.benchmarks import get_benchmark
from tic_clip.models import macs_per_sample
from tic_clip.runs import run_id, run_name
from tic_clip.storage import write_json
from tic_clip.training.config import Config
from tic_clip.training.plan import add_macs, check_step, choose_block, difference, make_plan, steps_of

YEARS = [str(year) for year in range(2014, 2023)]
SIZES = {"2014": 300, "2015": 100, "2016": 100, "2017-2018": 500}
SHARES = {"2015": {"2014": 0.25, "2015": 0.75}, "2016": {"2014": 0.1, "2016": 0.9}}


def add_splits(data, benchmark, sizes, folder="train"):
    """Write tables without shards, all that a plan reads."""
    for name, size in sizes.items():
        write_json(data / get_benchmark(benchmark).root / folder / name / "sizes.json", {"00000000.tar": size})


@pytest.fixture
def config(tmp_path):
    """Make the settings of a step of a run on four steps of TiC-Emoji."""
    add_splits(tmp_path / "data", "emoji", SIZES)
    write_json(tmp_path / "mixture.json", SHARES)
    (tmp_path / "2015.pt").touch()

    def make(**changes):
        paths = {"init": str(tmp_path / "2015.pt"), "mixture": str(tmp_path / "mixture.json")}
        changes = {key: paths[key] if value == key else value for key, value in changes.items()}
        names = {"benchmark": "emoji", "method": "cumulative", "scale": "tic_tiny", "step": "2016"}
        folders = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
        return Config(**{**names, **folders, "samples_per_step": 1280, **changes})

    return make


def sources(plan):
    return {source["name"]: (source["samples"], source["used"]) for source in plan["sources"]}


CUMULATIVE = {"2014": (768, 300), "2015": (256, 100), "2016": (256, 100)}
NEW = {"2016": (1280, 100)}
REPLAY = {"method": "cumulative-equal", "replay": 0.5}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, CUMULATIVE),
        ({"method": "oracle"}, {"2014": (2304, 300), "2015": (768, 100), "2016": (768, 100)}),
        ({"method": "patching"}, {"2016": (1280, 95)}),  # a twentieth is held out
        ({"method": "patching", "coefficient": 0.5}, NEW),
        (REPLAY, {"2014": (214, 25), "2015": (213, 25), "2016": (853, 100)}),
        (REPLAY | {"resampled": True}, {"2014": (214, 300), "2015": (213, 100), "2016": (853, 100)}),  # whole shards
        ({"mixture": "mixture", "method": "sequential"}, {"2014": (128, 300), "2016": (1152, 100)}),
        ({"mixture": "mixture", "step": "2015"}, {"2014": (320, 300), "2015": (960, 100)}),
        ({"mixture": "mixture", "step": "2014"}, {"2014": (1280, 300)}),  # not in the file: as the method does
        ({"init": "init", "first_step": "2016"}, CUMULATIVE),
    ],
)
def test_what_a_step_reads(config, changes, expected):
    assert sources(make_plan(config(**changes))) == expected


@pytest.mark.parametrize(
    ("changes", "start", "samples", "seen", "warmup", "optimizer"),
    [
        ({}, "2015/checkpoints/epoch_2.pt", 1280, 3840, 15, "fresh"),
        ({"step": "2014", "next_warmup": 9, "keep_optimizer": True}, None, 1280, 1280, 30, "fresh"),
        ({"next_warmup": 0, "keep_optimizer": True}, "2015/checkpoints/epoch_2.pt", 1280, 3840, 0, "kept"),
        ({"method": "oracle"}, None, 3840, 7680, 30, "fresh"),  # (1 + 2 + 3) · C
        ({"method": "restart"}, None, 1280, 3840, 30, "fresh"),
        ({"method": "patching"}, "2015/checkpoints/patched.pt", 1280, 3840, 15, "fresh"),
        ({"samples_per_step": 1400}, "2015/checkpoints/epoch_2.pt", 1280, 3840, 15, "fresh"),  # whole batches
        ({"budget": (1, 0.5, 2, 1, 1, 1, 1)}, "2015/checkpoints/epoch_2.pt", 2560, 4480, 15, "fresh"),
        ({"init": "init", "first_step": "2016"}, "2015.pt", 1280, 1280, 15, "fresh"),
        ({"init": "init", "first_step": "2015"}, "2015/checkpoints/epoch_2.pt", 1280, 2560, 15, "fresh"),
        ({"init": "init", "method": "restart"}, "2015.pt", 1280, 3840, 15, "fresh"),
    ],
)
def test_where_a_step_starts_and_how_long_it_is(config, changes, start, samples, seen, warmup, optimizer):
    plan = make_plan(config(**changes))
    assert (plan["start"] is None) if start is None else plan["start"].endswith(f"/{start}")
    found = tuple(plan[key] for key in ("samples", "samples_seen", "warmup", "optimizer"))
    assert found == (samples, seen, warmup, optimizer)
    assert plan["samples"] == plan["iterations"] * 64


LISTS = {"lr": (1e-3, 2e-3, 3e-3, 4e-3, 1, 1, 1), "warmup": (1, 2, 3, 4, 0, 0, 0)}


@pytest.mark.parametrize(
    ("changes", "rate", "warmup", "start", "optimizer"),
    [
        ({"lr": (5e-4,), "warmup": (7,)}, 5e-4, 15, "epoch_2.pt", "fresh"),  # the scale's next_warmup
        ({"step": "2014", "lr": (5e-4,), "warmup": (7,)}, 5e-4, 7, None, "fresh"),
        (LISTS, 3e-3, 3, "epoch_2.pt", "fresh"),
        (LISTS | {"init": "init", "first_step": "2016"}, 3e-3, 3, "2015.pt", "fresh"),
        ({"schedule": "wsd"}, 1e-3, 0, "before_cooldown.pt", "kept"),
        ({"schedule": "wsd", "step": "2014"}, 1e-3, 30, None, "fresh"),
        ({"schedule": "wsd", "next_warmup": 5, "keep_optimizer": False}, 1e-3, 5, "before_cooldown.pt", "fresh"),
        ({"schedule": "wsd", "cooldown": 0.0}, 1e-3, 0, "epoch_2.pt", "kept"),  # nothing to go back to
        ({"schedule": "wsd", "init": "init", "first_step": "2016"}, 1e-3, 15, "2015.pt", "fresh"),
    ],
)
def test_the_learning_rate_of_a_step(config, changes, rate, warmup, start, optimizer):
    plan = make_plan(config(**changes))
    assert (plan["learning_rate"], plan["warmup"], plan["optimizer"]) == (rate, warmup, optimizer)
    assert (plan["start"] and plan["start"].rsplit("/", 1)[1]) == start


def test_a_schedule_that_continues_counts_what_was_trained_before_the_cool_downs(config):
    """A step is 20 iterations in two blocks of ten, of which the last cools down."""
    plans = [make_plan(config(schedule="rsqrt", step=step, warmup=(8,))) for step in ("2014", "2015", "2016")]
    assert [plan["cooldown"] for plan in plans] == [10, 10, 10]
    assert [plan["trunk"] for plan in plans] == [0, 10, 20]
    assert [plan["run_warmup"] for plan in plans] == [8, 8, 8]
    teachers = make_plan(config(schedule="wsd", method="lwf"))
    assert teachers["teacher"].endswith("2015/checkpoints/epoch_2.pt")  # the last step's model, after its cool-down


def test_lwf_is_distilled_from_the_model_that_it_starts_from(config):
    plans = [make_plan(config(method="lwf", step=step)) for step in ("2014", "2016")]
    assert [plan["teacher"] == plan["start"] for plan in plans] == [True, True]
    assert [plan["samples_distilled"] for plan in plans] == [0, 2560]
    assert make_plan(config(method="lwf", init="init", first_step="2016"))["samples_distilled"] == 1280


def test_the_term_of_the_loss_for_the_last_model(config):
    names = ("loss_weight", "temperature", "anchor", "fisher_samples", "fisher_samples_seen")

    def facts(**changes):
        plan = make_plan(config(**changes))
        return {name: plan[name] for name in names if name in plan}

    assert facts() == {}
    assert facts(method="lwf") == {"loss_weight": 1, "temperature": 1}
    assert facts(method="lwf", loss_weight=0.0, temperature=2.0) == {"loss_weight": 0, "temperature": 2}
    # A twentieth of 1,280 samples is 64; every step has Fisher information, for the next one.
    found = facts(method="ewc", loss_weight=5.0)
    assert found.pop("anchor").endswith("2015/checkpoints/epoch_2.pt")
    assert found == {"loss_weight": 5, "fisher_samples": 64, "fisher_samples_seen": 192}
    assert facts(method="ewc", step="2014")["anchor"] is None
    assert facts(method="ewc", init="init", first_step="2016")["anchor"] is None  # no Fisher information of it
    each = macs_per_sample("ViT-Tiny-12-48")
    assert add_macs(make_plan(config(method="ewc")))["macs_seen"] == each * (3 * 1280 + 192)
    assert difference(make_plan(config(method="lwf")), make_plan(config(method="lwf", loss_weight=2.0)))


def test_patching_chooses_on_a_twentieth_of_every_step_before(config, tmp_path):
    plan = make_plan(config(method="patching"))
    assert [(entry["name"], entry["held_out"]) for entry in plan["validation"]] == [("2014", 15), ("2015", 5)]
    assert plan["coefficient"] == "chosen"
    assert "validation" not in make_plan(config(method="patching", coefficient=0.5))
    add_splits(tmp_path / "small", "emoji", SIZES | {"2014": 19, "2015": 19})
    with pytest.raises(TicError, match=r"a twentieth .*; of 19 of 2014, 19 of 2015: give a --coefficient"):
        make_plan(config(method="patching", data_dir=str(tmp_path / "small")))


# --- The published scales on 1, 2, … 9 M samples of 2014, 2015, … 2022 ---

MILLIONS = {year: (i + 1) * 1_000_000 for i, year in enumerate(YEARS)}


@pytest.fixture(scope="module")
def datacomp(tmp_path_factory):
    data = tmp_path_factory.mktemp("datacomp")
    add_splits(data, "datacomp", MILLIONS)
    add_splits(data, "datacomp", dict.fromkeys(YEARS, 10), "train_bestpool")
    return str(data)


def plans_of(data_dir, **changes):
    names = {"benchmark": "datacomp", "method": "sequential", "scale": "tic_medium", "step": "all"}
    config = Config(**{**names, "data_dir": data_dir, "output_dir": "o", **changes})
    return [make_plan(replace(config, step=step), 8) for step in steps_of(config)]


@pytest.mark.parametrize(
    ("scale", "iterations", "batch", "warmup", "method"),
    [
        ("medium", 4_500, 4_096, 500, "cumulative"),
        ("large", 22_500, 8_192, 500, "sequential"),
        ("xlarge", 20_500, 90_112, 10_000, "oracle"),
    ],
)
def test_the_benchmarks_runs(datacomp, scale, iterations, batch, warmup, method):
    plans = plans_of(datacomp, scale=f"tic_{scale}", method=method, resampled=True)
    assert [plan["step"] for plan in plans] == ["2014-2016", *YEARS[3:]]
    for t, plan in enumerate(plans):
        times, seen = (t + 1, (t + 1) * (t + 2) // 2) if method == "oracle" else (1, t + 1)
        fresh = method == "oracle" or t == 0
        assert (plan["model"], plan["batch_size"]) == ("ViT-B-16", batch)
        assert (plan["iterations"], plan["samples_seen"]) == (times * iterations, seen * iterations * batch)
        assert (plan["start"] is None, plan["warmup"]) == (fresh, warmup if fresh else 0)
        read = YEARS[t + 2 : t + 3] if method == "sequential" and t else YEARS[: t + 3]
        total, size = times * iterations * batch, sum(MILLIONS[year] for year in read)
        assert list(sources(plan)) == read
        assert sum(source["samples"] for source in plan["sources"]) == total
        assert all(abs(source["samples"] - total * source["size"] / size) < 1 for source in plan["sources"])


def test_filters_are_folders(datacomp):
    for name, size in (("basic", 9_000_000), ("bestpool", 10), (None, 9_000_000)):
        plan = plans_of(datacomp, filter=name)[-1]
        assert [source["size"] for source in plan["sources"]] == [size]
        assert run_name(plan) == f"datacomp-tic_medium-{name or 'basic'}-sequential-2022"


def test_blocks_fill_an_interval():
    """Of a prime number of iterations one is lost rather than eleven."""
    cases = {(60, 20): (3, 20), (900, 300): (3, 300), (5, 20): (1, 5), (151, 20): (6, 25), (100, 1): (100, 1)}
    assert {case: choose_block(*case) for case in cases} == cases


# --- Refused settings and restarts ---


UNLOCKED = {"openclip_flags": "--lock-image --lock-image-unlocked-groups 2", "grad_checkpointing": True}
COCA = {"model": "coca_ViT-B-32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic'; the methods are oracle, cumulative, cumulative-exp"),
        ({"step": "1999"}, "unknown step '1999' of emoji; the steps are 2014, 2015, 2016"),
        ({"filter": "best"}, "unknown filter 'best'; the filters are all"),
        ({"data_dir": "nowhere"}, "nowhere/tic/emoji/yearly/train/2014 is missing: run scripts/run_emoji_cumulative"),
        ({"batch_size": 1024}, r"less than 2 checkpoints × a batch of 1024 = 2048"),
        ({"batch_size": 32}, "batch of 32 does not divide among 3 processes"),
        ({"samples_per_step": 127}, "a step of 127 samples is less than 2 checkpoints × a batch of 64 = 128"),
        ({"budget": (1, 2)}, r"--budget has 2 numbers, emoji has 7 steps"),
        ({"replay": 1}, r"--replay is for cumulative-exp and cumulative-equal"),
        ({"method": "cumulative-exp", "replay": 1, "mixture": "mixture"}, r"without --mixture"),
        ({"coefficient": 0.5}, r"--coefficient is for patching"),
        ({"method": "patching", "resampled": True}, r"give --coefficient or --resampled 0"),
        ({"method": "patching", "keep_optimizer": True}, r"a patched model has no optimizer"),
        ({"first_step": "2016"}, r"--first_step 2016 needs --init"),
        ({"first_step": "2019"}, r"step 2016 is before the first step to train, 2019"),
        ({"lr": (1e-3, 1e-4)}, r"--lr has 2 numbers, emoji has 7 steps"),
        ({"warmup": (1,) * 8}, r"--warmup has 8 numbers, emoji has 7 steps"),
        ({"warmup": (1,) * 7, "next_warmup": 1}, r"a number for each step: leave out --next_warmup"),
        ({"loss_weight": 1.0}, r"cumulative has no term of the loss for the last model: --loss_weight"),
        ({"method": "ewc", "temperature": 2.0}, r"ewc distils no model: --temperature is for lwf"),
        ({"method": "averaging", "max_kept": 1}, r"averaging is of all 2 checkpoints of a step: --max_kept is below"),
        ({"schedule": "linear"}, r"unknown schedule 'linear'; the schedules are cosine, const, const-cooldown"),
        ({"cooldown": 0.1}, r"cosine has no cool-down: --cooldown is for const-cooldown, wsd, rsqrt"),
        ({"schedule": "wsd", "method": "oracle"}, r"oracle does not start from the last model: use const-cooldown"),
        ({"schedule": "rsqrt", "method": "patching"}, r"and patching does not start from the last model"),
        # What OpenCLIP would end in an assertion for.
        ({"accum_freq": 3}, "--accum_freq 3 does not divide the 64 samples of a process's batch"),
        ({"accum_freq": 2, "max_batch": 8}, "give one of them"),
        (UNLOCKED, "layers of --lock-image-unlocked-groups get no gradient with gradient checkpointing"),
        ({"method": "lwf", **COCA}, "lwf is OpenCLIP's distillation, which can't be used with CoCa"),
        ({"method": "lwf", "model": "ViT-B-16-SigLIP"}, "can't be used with SigLIP's loss"),
        ({"method": "lwf", "openclip_flags": "--siglip"}, "can't be used with SigLIP's loss"),
        ({"method": "lwf", "max_batch": 8}, "can't be used with accumulation"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_numbers(config, changes, message):
    with pytest.raises(TicError, match=message):
        make_plan(config(**changes), 3 if changes == {"batch_size": 32} else 1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"2016": {"2014": 0.25, "2016": 0.5}}, r"the shares of step 2016 sum to 0.75"),
        ({"2016": {"2019": 1}}, r"2019 is not data of step 2016; those are 2014, 2015, 2016"),
        ({"2016": {"2016": "all"}}, r"Expected `float`, got `str`"),
        ({"2016": {"2014": -1, "2016": 2}}, r"Expected `float` >= 0.0"),
        ({"soon": {"2016": 1}}, r"unknown step 'soon'"),
        ([1], r"is not {\"step\": {\"split\": share"),
    ],
)
def test_shares_that_cannot_be_are_refused(config, tmp_path, table, message):
    write_json(tmp_path / "mixture.json", table)
    with pytest.raises(TicError, match=message):
        make_plan(config(mixture="mixture"))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"resume_every": 5}, "resume_every 10, now it is 5"),
        ({"schedule": "wsd"}, "schedule cosine, now it is wsd"),
        ({"lr": (1e-4,)}, "lr 0.001, now it is 0.0001"),
        ({"lr": (1e-3,), "next_warmup": 15}, None),  # as they are by default
        ({"mixture": "mixture"}, "sources ['2014', '2015', '2016'], now it is ['2014', '2016']"),
        ({"method": "sequential"}, "method cumulative, now it is sequential"),
        ({"data_dir": "{}/moved", "output_dir": "/else/where"}, None),
        ({"max_kept": 1, "save_every": 640, "save_minutes": 1, "remote": "s3://x", "report_to": "wandb"}, None),
        ({"workers": 1, "accum_freq": 2, "grad_checkpointing": True}, None),
        ({"openclip_flags": "--torchcompile"}, "openclip_flags [], now it is ['--torchcompile']"),
        ({"precision": "amp_bf16"}, "precision fp32, now it is amp_bf16"),
    ],
)
def test_only_what_makes_the_model_is_a_difference(config, tmp_path, changes, found):
    add_splits(tmp_path / "moved", "emoji", SIZES)
    changes = {key: value.format(tmp_path) if key == "data_dir" else value for key, value in changes.items()}
    plan, other = (make_plan(config(**{"precision": "fp32"} | change)) for change in ({}, changes))
    assert difference(plan, other) == found
    assert json.loads(json.dumps(plan)) == plan


def test_a_run_has_the_same_id_on_any_hardware(config):
    changes = ({}, {"accum_freq": 2}, {"openclip_flags": "--torchcompile"})
    usual, other, different = (run_id(make_plan(config(**change)), "o") for change in changes)
    assert usual == other != different


def test_a_plan_of_an_earlier_version_is_compared_in_what_both_know(config):
    plan = make_plan(config())
    assert difference({key: value for key, value in {**plan, "gone": 1}.items() if key != "beta2"}, plan) is None
    later = ("schedule", "cooldown", "trunk", "run_warmup", "image_backend", "openclip_flags", "layout")
    old = {key: value for key, value in plan.items() if key not in later}
    for change, found in (
        ({}, None),
        ({"schedule": "wsd"}, "schedule cosine, now it is wsd"),
        ({"image_backend": "torchvision"}, "image_backend pil, now it is torchvision"),
        ({"openclip_flags": "--lock-text"}, "openclip_flags [], now it is ['--lock-text']"),
    ):
        assert difference(old, make_plan(config(**{"image_backend": "pil"} | change))) == found
    other = {**plan, "sources": [{**source, "size": 1} for source in plan["sources"]]}
    assert difference(other, plan) == "samples of 2014 768 of 300 of 1, now it is 768 of 300 of 300"


def finish(config, step, **changes):
    """Write what a finished step leaves."""
    plan = make_plan(config(step=step, **changes))
    folder = config().output_dir + f"/{step}"
    weights.write({"state_dict": {}, "tic": {"cutoff": plan["cutoff"]}}, f"{folder}/checkpoints/epoch_2.pt")
    write_json(f"{folder}/plan.json", plan)
    write_json(f"{folder}/done.json", {"plan": plan, "checkpoint": "checkpoints/epoch_2.pt"})


def test_a_step_is_checked_before_it_is_trained(config, tmp_path):
    missing = config(init="/nowhere/2015.pt", step="2014")
    with pytest.raises(TicError, match=r"checkpoint /nowhere/2015.pt is missing"):
        check_step(missing, make_plan(missing), dry_run=True)
    now = config()
    with pytest.raises(TicError, match=r"2016 starts from .*epoch_2.pt, but that step is not done: train it first"):
        check_step(now, make_plan(now))
    assert check_step(now, make_plan(now), dry_run=True) is False
    finish(config, "2015")
    assert check_step(now, make_plan(now)) is False
    done = config(step="2015")
    assert check_step(done, make_plan(done)) is True
    for changes, message in (
        ({"step": "2015", "seed": 1}, "out/2015 was begun with seed 0, now it is 1: use the old setting"),
        ({"seed": 1}, "2016 starts from 2015, which was trained with seed 0, now it is 1"),
        ({"samples_per_step": 640}, "which was trained with samples_seen 2560, now it is 1280"),
    ):
        with pytest.raises(TicError, match=message):
            check_step(config(**changes), make_plan(config(**changes)))
    (tmp_path / "out/2015/checkpoints/epoch_2.pt").unlink()
    for each in (now, done):
        with pytest.raises(TicError, match=r"out/2015/checkpoints/epoch_2.pt is missing, but its step is done"):
            check_step(each, make_plan(each), dry_run=True)


@pytest.mark.parametrize(
    ("name", "record", "latest"),
    [
        ("model", {"cutoff": 201612}, None),
        ("model", {"cutoff": 201712}, 201712),
        ("2019", None, 201912),  # a released model, which records nothing
        ("2019", {"cutoff": 201412}, None),
        ("201603", None, None),
    ],
)
def test_a_start_from_a_later_year_is_refused_in_a_dry_run_too(config, tmp_path, name, record, latest):
    weights.write({"state_dict": {}, "tic": record}, tmp_path / f"{name}.pt")
    now = config(init=str(tmp_path / f"{name}.pt"), first_step="2016")
    message = f"has seen data up to {latest}, after those of step 2016, 201612"
    with pytest.raises(TicError, match=message) if latest else nullcontext():
        assert check_step(now, make_plan(now), dry_run=True) is False

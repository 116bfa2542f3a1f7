"""A pool of tars with a date in each sample's JSON to lists of UIDs by step, and by reshard.py to splits."""

import hashlib
import json

import pytest
import yaml
from conftest import call_script, tree
from miniature import held_out

from tic_clip.data.split import split_sizes
from tic_clip.data.uids import format_uids, open_uids
from tic_clip.storage import read_json, upload

SCRIPT = "dataset_creation/create_splits.py"
INPUT = ("--pool", "pool", "--date-field", "timestamp")
FLAGS = (*INPUT, "--name", "mine", "--output-path", "lists", "--test-share", "0.3")
DATES = ("2014-05-01T00:00:00Z", 1451606399, "2016", 1451606400000, "1999-12-31")  # 2015's last second, 2016's first


def date(number, members):
    members["json"] = json.dumps({**json.loads(members["json"]), "timestamp": DATES[number % 5]}).encode()


def split(folder, *flags, code=0):
    done = call_script(SCRIPT, *FLAGS, *flags, cwd=folder)
    assert done.returncode == code, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if line.startswith(("error: ", "warning: "))]


def lists(folder):
    paths = (folder / "lists/uids").rglob("*.npy")
    return {str(path.relative_to(folder / "lists/uids"))[:-4]: format_uids(open_uids(path)) for path in paths}


def test_from_a_pool_to_splits(tmp_path, make_pool):
    pool = make_pool((30, 1, 40), "pool", date)
    printed, errors = split(tmp_path, "--steps", "2014-2015,2016")
    expected = {f"{kind}/{step}": [] for kind in ("train", "eval/retrieval") for step in ("2014-2015", "2016")}
    for number, uid in enumerate(pool.uids):
        if number % 5 < 4:
            kind = "eval/retrieval" if held_out("mine", uid, 0.3) else "train"
            expected[f"{kind}/{'2014-2015' if number % 5 < 2 else '2016'}"].append(uid)
    assert lists(tmp_path) == {name: sorted(uids) for name, uids in expected.items()}
    manifest = read_json(tmp_path / "lists/manifest.json")
    assert (manifest["read"], manifest["dropped"]) == (71, {"outside the steps": 14})
    train, test = (len(expected[f"{kind}/2016"]) for kind in ("train", "eval/retrieval"))
    assert manifest["counts"]["2016"] == {"train": train, "test": test}
    benchmark = yaml.safe_load((tmp_path / "lists/benchmark.yaml").read_text())
    assert (benchmark["steps"], benchmark["cadence"]) == (["2014-2015", "2016"], "steps")
    assert errors[0].startswith("warning: test sets of fewer than 50")
    command = printed.splitlines()[-1].removeprefix("next: python ")
    assert command.endswith(" && cp lists/benchmark.yaml data/tic/mine/steps/")
    words = command.partition(" && ")[0].split()
    assert call_script(*words, cwd=tmp_path).returncode == 0
    for name, uids in expected.items():
        assert sum(split_sizes(tmp_path / "data/tic/mine/steps" / name).values()) == len(uids)
    before = tree(tmp_path / "lists")
    assert "already there" in split(tmp_path, "--steps", "2014-2015,2016")[0]
    split(tmp_path, "--steps", "2014-2015,2016", "--overwrite", "-j", "2")
    assert tree(tmp_path / "lists") == before


def test_every_year_and_near_equal_steps(tmp_path, make_pool):
    make_pool((30, 30), "pool", date)
    printed, _ = split(tmp_path, "--suggest", "2")
    assert [line.split() for line in printed.splitlines()] == [
        ["199912-201511", "24"],
        ["201512-201601", "36"],
        [],
        ["--steps", "199912-201511,201512-201601"],
    ]
    assert not (tmp_path / "lists").exists()
    _, (error,) = split(tmp_path, "--every", "year", code=1)
    assert error.startswith("error: step 2000, 2001, 2002 and 11 more has no sample to train on (the first that has")


def test_what_can_not_be_used_is_counted(tmp_path, make_pool):
    """A UID that the pool has twice, of another date, is taken once: the first."""

    uids = [hashlib.sha256(f"picture {i} of pool".encode()).hexdigest()[:32] for i in (0, 6)]
    changes = {1: {"timestamp": "soon"}, 2: {"timestamp": None}, 5: {"uid": uids[0], "timestamp": 2016}}
    changes |= {6: {"nan": float("nan")}, 7: {"uid": "none"}}  # Python writes and reads NaN

    def spoil(number, members):
        date(number, members)
        record = json.loads(members["json"]) | changes.get(number, {})
        members["json"] = b"{" if number == 8 else json.dumps(record).encode()

    make_pool((10, 10), "pool", spoil)
    _, (error,) = split(tmp_path, "--steps", "2014-2015,2016", code=1)
    assert error.startswith("error: pool/00000000.tar, sample 000000001: the date can't be read: 'soon'")
    split(tmp_path, "--steps", "2014-2015,2016", "--skip-bad-rows")
    manifest = read_json(tmp_path / "lists/manifest.json")
    bad = {"duplicate uid": 1, "impossible date": 2, "invalid json": 1, "no valid uid": 1}
    assert (manifest["read"], manifest["dropped"]) == (20, {**bad, "outside the steps": 4})
    found = lists(tmp_path)
    assert set(uids) <= {*found["train/2014-2015"], *found["eval/retrieval/2014-2015"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--date-field", "taken"), "tar, sample 000000000 has no field taken in its JSON; it has uid, caption, key"),
        (("--date-field", ""), "--date must be given"),
        (("--pool", "none"), "none is missing"),
        (("--date-format", "%d.%m."), "00000000.tar, sample 000000000: the date can't be read"),
        (("t.csv",), "not allowed with argument"),
        (("--date-field", 'a"b'), 'has no field a"b in its JSON'),
        (("--label", "kind"), "--label is for tables"),
    ],
)
def test_bad_input_is_one_line(tmp_path, make_pool, flags, message):
    make_pool((20,), "pool", date)
    _, (error,) = split(tmp_path, "--every", "year", *flags, code=1)
    assert message in error
    assert not list((tmp_path / "lists").glob("*"))


def test_a_pool_in_a_cloud(tmp_path, make_pool, s3):
    pool = make_pool((10, 10), "pool", date)
    for number in range(2):
        upload(tmp_path / f"pool/{number:08d}.tar", f"{s3}/pool/{number:08d}.tar")
    split(tmp_path, "--pool", f"{s3}/pool", "--steps", "1999,2014-2016")
    assert sorted(uid for uids in lists(tmp_path).values() for uid in uids) == sorted(pool.uids)


def test_a_pool_without_uids_says_so(tmp_path, make_pool):
    make_pool((5,), "pool", lambda number, members: members.update(json=b'{"timestamp": 1400000000}'))
    _, (error,) = split(tmp_path, "--every", "year", code=1)
    assert error == "error: pool has no sample that can be used; dropped: {'no valid uid': 5}"

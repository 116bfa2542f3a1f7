"""The bash blocks of README.md and of docs/, run page by page in copies of the checkout.

A pool of a few hundred images, a hub and an S3, all of this machine; a tiny model. What makes it
small is set in the environment, as the README says; the commands are its own, word for word.
"""

import csv
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hub import serving_hub
from miniature import make_image, write_redcaps, write_yfcc

from tic_clip.benchmarks import MONTHS
from tic_clip.data.eval_uids import imagenet_synsets
from tic_clip.data.released import DATASET, MONTHLY, TABLES, YEARLY, YEARS
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import fingerprint, make_uid, parse_uids, save_uids, unique_uids
from tic_clip.evaluation.data import TEMPLATES

ROOT = Path(__file__).parent.parent
SMALL = {
    **{"MODEL": "ViT-Tiny-8-48", "SAMPLES_PER_STEP": "80", "BATCH_SIZE": "16", "WORKERS": "0"},
    **{"PRECISION": "fp32", "MAX_KEPT": "1", "PYTEST_ADDOPTS": "tests/data/test_uids.py"},
    **{"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"},
    **{"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"},
}
WITH_DATACOMP = (ROOT / "datacomp").exists()
# What a block's first line says that it needs, and what is done with it here.
NEEDS = {"GPUs": "dry", "a download": "dry", "GitHub": "ran", "datacomp": "ran", "the web": "skipped"}
NEEDS |= {"Slurm": "skipped", "a bucket": "skipped"}
# What the blocks of some scripts have beside SMALL: one method, and one year of TiC-Emoji; .ci/run evaluates all.
LESS = {"run_emoji_all.sh": {"METHODS": "cumulative"}, "run_emoji": {"TASKLIST": "few.yml"}}
FEW = "tic/emoji/emojinet/yearly/2020: {}\ntic/emoji/retrieval/yearly/2020: {}\n"


def pages(*names):
    return tuple(f"docs/{name}.md" for name in names)


# Pages that go on from each other in one checkout, and what their runs leave: (results, steps).
GROUPS = {
    "datacomp": (
        ("README.md", *pages("yfcc_redcaps", "data", "training", "evaluation", "cluster", "datacomp")),
        (("medium_basic_cumulative", 7), ("yfcc15m/cumulative", 4), ("redcaps/cumulative", 4)),
    ),
    "own": (pages("own_data"), ()),
}


def blocks(text):
    """(line in the page, the block, what it needs, what is done with it where there is a checkout of DataComp)."""
    for found in re.finditer(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        mark = re.match(rf"# needs ({'|'.join(NEEDS)})\b", found[1])
        assert mark or "# needs" not in found[1], found[1]
        needs = mark[1] if mark else None
        yield text[: found.start()].count("\n") + 2, found[1], needs, NEEDS.get(needs, "ran")


def write_pool(folder, uids):
    """Shards of 100 samples in DataComp's format, as its downloader leaves them."""
    for shard in range(-(-len(uids) // 100)):
        chosen = list(enumerate(uids[100 * shard : 100 * shard + 100], 100 * shard))
        rows = [(f"{n:09d}", {"uid": uid, "caption": f"picture {n}", "key": f"{n:09d}"}) for n, uid in chosen]
        samples = (
            (key, {"jpg": make_image(key), "json": json.dumps(row).encode(), "txt": row["caption"].encode()})
            for key, row in rows
        )
        write_shard(folder / f"{shard:08d}.tar", samples)
        (folder / f"{shard:08d}_stats.json").write_text(json.dumps({"successes": len(rows)}))


def write_lists(folder):
    """The released lists, of ten years and 102 months; returns all their UIDs but some that are in no pool.

    A month has three samples to train on, two for retrieval, and one of each of two classes.
    """
    training, retrieval, classes, months = ({year: [] for year in YEARS} for _ in range(4))
    for month in MONTHS:
        year, new = month[:4], [make_uid(f"{month}/{i}") for i in range(8)]
        training[year] += new[:4]
        retrieval[year] += new[4:6]
        classes[year] += new[6:]
        months[year].append((month, new))
    for year in YEARS:
        save_uids(folder / YEARLY / f"{year}.npy", parse_uids(training[year]))
        for month, uids in months[year]:
            save_uids(folder / MONTHLY / f"{month}.npy", parse_uids(uids))
    tench, goldfish = imagenet_synsets()[:2]
    synsets = {year: {tench: uids[::2], goldfish: uids[1::2]} for year, uids in classes.items()}
    for task, table in (("retrieval", retrieval), ("datacompnet", synsets)):
        (folder / f"{TABLES[task]}.json").write_text(json.dumps(table))
    gone = {month[1][0] for year in YEARS for month in months[year][:1]}
    return [uid for year in YEARS for _, uids in months[year] for uid in uids if uid not in gone]


def released_model():
    """The bytes of a checkpoint as the released ones are, of the tiny model."""
    import torch

    from tic_clip.models import make_model

    file = io.BytesIO()
    torch.save({"state_dict": make_model("ViT-Tiny-8-48", "cpu")[0].state_dict()}, file)
    return file.getvalue()


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git has, and of what setup.sh has made; the packages, which nothing here changes, are linked.

    TiC-Emoji's data too, if they are there: .ci/run has built them from nothing.
    """
    folder = tmp_path / "tic-clip"
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("open_clip", "datacomp") if WITH_DATACOMP else ("open_clip",):
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
    shutil.copytree(ROOT / ".venv/bin", folder / ".venv/bin", symlinks=True)  # they find the folder that they are in
    for path in (ROOT / ".venv").iterdir():
        if path.name != "bin":
            (folder / ".venv" / path.name).symlink_to(path)
    if (ROOT / "data/emoji").exists():
        shutil.copytree(ROOT / "data/emoji", folder / "data/emoji")
    (folder / "few.yml").write_text(FEW)
    return folder


@pytest.fixture
def environment(checkout, tmp_path, s3_server):
    """What a user would set: the small sizes, and where the servers are, which have all that is asked of them."""
    import boto3

    lists = tmp_path / "lists"
    uids = write_lists(lists)
    (checkout / "pool").mkdir()
    write_pool(checkout / "pool", uids)
    for name, count in (("basic", len(uids) - 5), ("bestpool", len(uids) // 2)):
        save_uids(checkout / f"data/lists/{name}.npy", unique_uids(parse_uids(uids[:count])))
    for cadence in ("yearly", "monthly"):  # one prompt a class, not eighty, of which 560,000 take a laptop minutes
        folder = checkout / f"data/tic/datacomp/{cadence}/eval/datacompnet"
        folder.mkdir(parents=True)
        (folder / TEMPLATES).write_text("a photo of a {c}.\n")
    (checkout / "sources/yfcc15m").mkdir(parents=True)
    write_yfcc(checkout / "sources/yfcc15m")
    write_redcaps(checkout / "sources/redcaps")
    bucket = boto3.resource(
        "s3", endpoint_url=s3_server.url, region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x"
    )
    pool, data = (bucket.create_bucket(Bucket=name) for name in ("tic-pool", "tic-data"))
    for path in (checkout / "pool").iterdir():
        pool.upload_file(str(path), f"shards/{path.name}")
    files = {"apple/TiC-CLIP-basic-cumulative": {"checkpoints/2018.pt": released_model()}}
    files[DATASET] = {str(path.relative_to(lists)): path.read_bytes() for path in lists.rglob("*") if path.is_file()}
    others = ("PYTEST_", "TIC_", "PYTHONDONTWRITEBYTECODE")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    with serving_hub(files) as hub:
        address = {"HF_ENDPOINT": hub.url, "AWS_ENDPOINT_URL": s3_server.url}
        yield {**clean, **SMALL, **address, "HF_HOME": str(lists / "hf")}
    for one in (pool, data):
        one.objects.delete()
        one.delete()


def test_every_page_with_a_command_is_run():
    pages = [path.relative_to(ROOT) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    with_commands = {str(page) for page in pages if list(blocks((ROOT / page).read_text()))}
    assert with_commands == {page for group, _ in GROUPS.values() for page in group}
    marks = {mark for page in pages for mark in re.findall(r"^```(\w+)$", (ROOT / page).read_text(), re.MULTILINE)}
    assert marks == {"bash", "yaml", "python", "bibtex"}  # no command is elsewhere


def cpu_seconds():
    """Return the CPU time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_blocks(page, checkout, environment):
    """Run a page's blocks as in one shell: each begins with what those before it have exported; count what was done."""
    done, seconds, exported = Counter(), [], checkout.parent / "exported"
    exported.write_text("")
    for line, block, needs, state in blocks((ROOT / page).read_text()):
        if needs in ("GitHub", "datacomp") and not WITH_DATACOMP:
            state = "skipped"
        done[state] += 1
        if state == "skipped":
            continue
        own = {"DRY_RUN": "1"} if state == "dry" else {}
        own |= {"SCALE": "tic_tiny", "SAMPLES_PER_STEP": "320"} if needs == "datacomp" else {}  # batches of 64
        for script, settings in LESS.items():
            own |= settings if script in block else {}
        script = f'source "{exported}"\n{block}\nexport -p > "{exported}"\n'
        shell = ["bash", "-euo", "pipefail", "-c", script]
        before = cpu_seconds()
        ran = subprocess.run(
            shell, cwd=checkout, env={**environment, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert ran.returncode == 0, f"{page}, line {line}:\n{block}\n{ran.stdout[-3000:]}"
        seconds.append(f"{line}: {cpu_seconds() - before:.0f}")
        for name in own:  # the next block is without it
            subprocess.run(["sed", "-i", f"/ {name}=/d", exported], check=True)
    said = f"{page}: of {done.total()} blocks {done['ran']} ran, {done['dry']} ran dry, {done['skipped']} skipped"
    return f"{said}; CPU seconds by line: {', '.join(seconds)}"


def check_sweep(checkout, environment):
    """Run two seeds with accumulation, bfloat16 (slow on most CPUs) and a schedule over all steps: one row of both."""
    settings = {"SEEDS": "0 1", "SCHEDULE": "wsd", "ACCUM_FREQ": "2", "OPENCLIP_FLAGS": "--precision amp_bf16"}
    settings |= {"PRECISION": "", "OUTPUT_DIR": "results/sweep", "METHOD": "cumulative"}
    settings |= {"SCALE": "tic_tiny", "SAMPLES_PER_STEP": "32", "MODEL": ""}
    command = ["bash", "scripts/run_redcaps.sh"]
    done = subprocess.run(command, cwd=checkout, env={**environment, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = checkout / "results/sweep/redcaps"
    for name, seed in (("cumulative", 0), ("cumulative_seed1", 1)):
        plans = [json.loads(path.read_text()) for path in sorted((folder / name).glob("*/plan.json"))]
        assert [plan["seed"] for plan in plans] == [seed] * 4
        assert {(plan["precision"], plan["schedule"], plan["layout"]["accum_freq"]) for plan in plans} == {
            ("amp_bf16", "wsd", 2)
        }
    [row] = csv.DictReader((folder / "comparison/table.csv").read_text().splitlines())
    deviations = [float(row[f"retrieval {name} sd"]) for name in ("backward", "ID", "forward")]
    assert min(deviations) >= 0
    assert "±" in (folder / "comparison/table.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_blocks_run_in_their_order(group, checkout, environment, capsys):
    pages, runs = GROUPS[group]
    for page in pages:
        settings = {**environment}
        if page == "docs/own_data.md":  # it brings its own sizes
            settings |= dict.fromkeys(SMALL.keys() - {"no_proxy", "NO_PROXY"}, "")
        elif page != "README.md":  # which says how
            settings["PATH"] = f"{checkout}/.venv/bin:{os.environ['PATH']}"
        said = run_blocks(page, checkout, settings)
        with capsys.disabled():
            print(f"\n{said}", file=sys.stderr)  # stdout is not pytest's own in a process of pytest-xdist
    for path in checkout.glob("**/results/**/table.md"):  # no report is empty
        assert path.stat().st_size
        assert (path.parent / "report.html").stat().st_size
    for name, steps in runs:
        run = json.loads((checkout / f"results/{name}/summary.json").read_text())
        assert len(run["steps"]) == steps
        assert all(number is not None for task in run["tasks"].values() for row in task["matrix"] for number in row)
    if group == "datacomp":
        plan = json.loads((checkout / "results/medium_basic_cumulative/2017/plan.json").read_text())
        years = ("2014", "2015", "2016", "2017")
        lists = {year: fingerprint(checkout / f"data/lists/basic/yearly/train/{year}.npy") for year in years}
        assert plan["lists"] == lists
        check_sweep(checkout, environment)
    else:
        shapes = json.loads((checkout / "own/results/shapes/cumulative/summary.json").read_text())
        assert set(shapes["tasks"]) == {"retrieval", "labels"}
        assert all(number is not None for task in shapes["tasks"].values() for row in task["matrix"] for number in row)

"""Run an experiment: make its data, train every step, evaluate every step's model on every period, write the report.

    METHOD=cumulative SCALE=tic_tiny .venv/bin/python scripts/run.py --benchmark emoji

The run_*.sh call this. The flags fix what a script's name says; all other settings come from the environment
(scripts/cli.sh lists them). Run it again after an interruption to resume.
"""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import require_venv  # noqa: F401

import evaluate
import train

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import Parser, run_main
from tic_clip.parallel import end_with
from tic_clip.runs import BENCHMARK_FILE
from tic_clip.settings import check_fixed, is_on, name_variables, read_environment
from tic_clip.training.config import SCALES, Config
from tic_clip.training.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
TRAINING = [each.name.upper() for each in fields(Config) if each.name not in ("step", "output_dir")]
WHEN = ("end", "step")
SWEEP = ("METHODS", "SEEDS")
FIXED = ("BENCHMARK", "METHOD", "SCALE", "FILTER")
EVALUATION = ("IMAGENET_VAL", "TASKLIST", "PRECISION")
COLUMNS = [f"TABLE_{name}" for name in ("IMAGE", "CAPTION", "DATE", "LABEL", "KEY", "EVERY", "STEPS")]
SPLITS = ("TEST_SHARE",)
PROCESSES = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
OWN = ("OUTPUT_DIR", "OUT", "SOURCE", "TABLE", "EVALUATE", "OVERWRITE", "DRY_RUN", "SKIP_BAD")
KNOWN = [*TRAINING, *SWEEP, *EVALUATION, *COLUMNS, *SPLITS, *PROCESSES, *OWN]
RENAMED = {"WEIGHTS": "MIXTURE", "BUFFER": "REPLAY", "BLOCK": "RESUME_EVERY"}
OTHERS = ("MODELS", "RESULTS")  # of evaluate_released.sh and run_emoji_all.sh: not misspelt
DATASETS = {"yfcc15m": "yfcc15m.csv", "redcaps": "annotations"}
"""The datasets that are packed from files in SOURCE, and what beside images/ must be there."""
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Read the settings and run the experiment."""
    parser = Parser(__doc__)
    for name in FIXED:
        parser.add_argument(f"--{name.lower()}", help=f"the {name.lower()}; another one in {name} is refused")
    parser.add_argument("--script", default="scripts/run.py", help="its name in errors (default: scripts/run.py)")
    args = vars(parser.parse_args())
    fixed = {name: args[name.lower()] for name in FIXED if args[name.lower()]}
    environ = {name: value for name, value in os.environ.items() if name not in OTHERS}
    if environ.get("POLICY"):
        raise TicError("POLICY is gone: set NEXT_WARMUP (2000 for released, 15 for tiny), or KEEP_OPTIMIZER=1 for kept")
    settings = read_environment(environ, KNOWN, RENAMED)
    for name in SWEEP:
        if name in settings and (one := (settings | fixed).get(name[:-1])):
            raise TicError(f"{name} is set, and {name[:-1]} is {one} for {args['script']}: leave out one of them")
    check_fixed(settings, fixed, args["script"])
    names = {*settings, *(name[:-1] for name in SWEEP if name in settings)}
    try:
        run({**fixed, **settings})
    except TicError as error:
        raise TicError(name_variables(str(error), names)) from None
    except SystemExit as error:
        sys.exit(name_variables(error.code, names) if isinstance(error.code, str) else error.code)


def run(settings: dict[str, str]) -> None:
    """Make the data, train, evaluate and report; compare several runs."""
    dry_run, skip_bad, overwrite = (is_on(settings, name) for name in ("DRY_RUN", "SKIP_BAD", "OVERWRITE"))
    if "TABLE" in settings:
        data_dir, name = settings.setdefault("DATA_DIR", default_folder("data")), Path(settings["TABLE"]).name
        settings.setdefault("BENCHMARK", f"{data_dir}/lists/{name.split('.')[0]}/{BENCHMARK_FILE}")
        if not dry_run:
            cut_table(settings, overwrite)
        elif not Path(settings["BENCHMARK"]).exists():
            missing = f"{settings['BENCHMARK']} is missing"
            raise TicError(f"{missing}: a dry run does not make it of TABLE, create_splits.py does")
    benchmark = get_benchmark(settings.setdefault("BENCHMARK", "datacomp"))
    dataset = "" if benchmark.text else benchmark.name.split("_")[0]  # a file's benchmark is packed as it says
    data_dir = settings.setdefault("DATA_DIR", default_folder("data/emoji" if dataset == "emoji" else "data"))
    if settings.setdefault("EVALUATE", "end") not in WHEN:
        raise TicError(f"EVALUATE is {settings['EVALUATE']}: it must be one of {', '.join(WHEN)}")
    launch, runs = make_launcher(settings), list_runs(settings, benchmark.name)
    for flags in runs.values():
        train.parse_args(flags)  # a wrong value shows before hours of packing
    if dataset == "emoji":
        make_emoji(data_dir)
    if dataset in DATASETS:
        pack_source(settings, dataset, dry_run, overwrite)
    if benchmark.text and "SOURCE" in settings:
        if not Path(source := settings["SOURCE"]).is_dir():
            raise TicError(f"SOURCE is {source}, which is not a folder (as seen from {Path.cwd()})")
        if not dry_run:
            pack_images(os.path.dirname(settings["BENCHMARK"]), source, data_dir, overwrite)
    for flags in runs.values():
        train.main([*flags, "--dry_run" if dry_run else "--check"], launch.world_size)
    if dry_run:
        return
    evaluation = ["--data_dir", data_dir, *make_flags(EVALUATION, settings), *["--skip_bad"] * skip_bad]
    if launch.node_rank == 0:
        evaluate.main(["--check", "--benchmark", benchmark.name, *evaluation])
    train_runs(runs, launch, evaluation, by_step=settings["EVALUATE"] == "step")
    if launch.node_rank == 0 and is_sweep(settings):
        write_report([*runs, "--out", locate_output(settings, benchmark.name, "comparison")])


def is_sweep(settings: dict[str, str]) -> bool:
    """Return whether a script is asked for several runs."""
    return any(name in settings for name in SWEEP)


def list_runs(settings: dict[str, str], benchmark: str) -> dict[str, list[str]]:
    """Return the folder of each run and its flags of train.py: one, or one for each of METHODS and each of SEEDS."""
    several = [dict.fromkeys(settings.get(name, "").replace(",", " ").split()) for name in SWEEP]
    methods, seeds = several[0] or [settings.get("METHOD", "not set")], several[1] or [settings.get("SEED", "")]
    named = [("METHODS" if several[0] else "METHOD", METHODS, method) for method in methods]
    for name, table, value in (*named, ("SCALE", SCALES, settings.get("SCALE", "not set"))):
        if value not in table and not value.endswith((".yaml", ".yml")):  # a file of one's own
            raise TicError(f"{name} is {value}: it must be one of {', '.join(table)}")
    runs = {}
    for method, seed in itertools.product(methods, seeds):
        suffix = f"_seed{seed}" * ("SEEDS" in settings and seed != "0")
        one = {**settings, "METHOD": method} | ({"SEED": seed} if seed else {})
        out = locate_output(one, benchmark, method, suffix)
        runs[out] = [*make_flags(TRAINING, one), "--output_dir", out, "--step", "all"]
    return runs


def train_runs(runs: dict[str, list[str]], launch: "Launcher", evaluation: list[str], by_step: bool) -> None:
    """Train, evaluate and report each run, or each of its steps."""
    for out, flags in runs.items():
        steps = train.list_steps(train.config_from(train.parse_args(flags))) if by_step else ["all"]
        done = [Path(out, step, "done.json").exists() for step in [*steps, ""]].index(False)
        for step in steps[max(done - 1, 0) :]:  # the last one that is done may lack its evaluation
            run_script(train, launch.command, [*flags[:-1], step], 1)
            run_script(evaluate, launch.local, ["--train_output_dir", out, *evaluation])
            if launch.node_rank == 0:
                write_report([out, "--out", out])


def run_script(script: ModuleType, torchrun: list[str], flags: list[str], *world_size: int) -> None:
    """Run train.py or evaluate.py in this process, or in those of torchrun if there are to be several."""
    if torchrun:
        start([*torchrun, ROOT / f"scripts/{script.__name__}.py", *flags])
    else:
        script.main(flags, *world_size)


def write_report(flags: list[str]) -> None:
    """Run report.py in this process; what it imports takes a second, which a dry run does not need."""
    import report

    report.main(flags)


def default_folder(name: str) -> str:
    """Return a folder of the checkout, as seen from where the user stands."""
    return os.path.relpath(ROOT / name)


def locate_output(settings: dict[str, str], benchmark: str, method: str, suffix: str = "") -> str:
    """Return the run's folder: OUT, or one by the run's name in OUTPUT_DIR; its copy has the same name in REMOTE.

    Of several runs, OUT is the folder that holds them all.
    """
    name = f"{benchmark}/{method}"
    if benchmark in ("datacomp", "datacomp_monthly"):
        parts = settings["SCALE"].removeprefix("tic_"), settings.get("FILTER", "basic"), method
        name = "_".join([*parts, *benchmark.split("_")[1:]])
    folder = settings.get("OUTPUT_DIR", default_folder("results"))
    if "OUT" in settings:
        folder, name = settings["OUT"], method if is_sweep(settings) else ""
    if "REMOTE" in settings and name:
        settings["REMOTE"] = f"{settings['REMOTE'].rstrip('/')}/{name}{suffix}"
    return f"{folder.rstrip('/')}/{name}{suffix}" if name else folder


def make_flags(names: Iterable[str], settings: dict[str, str]) -> list[str]:
    """Return the variables that are set as flags of a script."""
    return [f"--{name.removeprefix('TABLE_').lower()}={settings[name]}" for name in names if name in settings]


@dataclass(frozen=True)
class Launcher:
    """How many processes there are, and the commands that start those of this machine: together, or each for itself."""

    world_size: int
    node_rank: int
    command: list[str]
    local: list[str]


def make_launcher(settings: dict[str, str]) -> Launcher:
    """Return how training is started: in this process, or by torchrun."""
    if "RANK" in os.environ:
        raise TicError("this starts torchrun itself: set NPROC, or run scripts/train.py --step all under torchrun")
    for name in ("NPROC", "NNODES"):
        if not (settings.get(name, "1").isdecimal() and int(settings.get(name, "1"))):
            raise TicError(f"{name} is {settings[name]}, not a whole number from 1")
    nproc, nnodes = int(settings.get("NPROC", "1")), int(settings.get("NNODES", "1"))
    node_rank = settings.get("NODE_RANK", "0")
    if not (node_rank.isdecimal() and int(node_rank) < nnodes):
        raise TicError(f"NODE_RANK is {node_rank}, not a number from 0 to {nnodes - 1}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
    local, command = ([*torchrun, "--standalone"] if nproc > 1 else []), torchrun
    if nnodes == 1:
        command = local
    elif "MASTER_ADDR" not in settings:
        raise TicError(f"MASTER_ADDR is not set: NNODES is {nnodes}, and it is the first machine's name")
    else:
        command += ["--nnodes", str(nnodes), "--node-rank", node_rank, "--master-addr", settings["MASTER_ADDR"]]
        command += ["--master-port", settings.get("MASTER_PORT", "29500")]
    if nproc > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // nproc)))
    return Launcher(nproc * nnodes, int(node_rank), command, local)


def make_emoji(data_dir: str) -> None:
    """Build TiC-Emoji: the pool, then its training and evaluation splits in one pass."""
    split = f"{data_dir}/tic/emoji/yearly"
    create("tic-emoji/create_pool.py", "--output_dir", data_dir)
    flags = ["-i", f"{data_dir}/pool", "-o", split, "-s", f"{data_dir}/uids", "-c", f"{data_dir}/classes"]
    create("reshard.py", *flags, "-j", str(CORES), stdout=subprocess.DEVNULL)
    shutil.copytree(f"{data_dir}/eval_files", f"{split}/eval", dirs_exist_ok=True)


def pack_source(settings: dict[str, str], dataset: str, dry_run: bool, overwrite: bool) -> None:
    """Split and pack what SOURCE holds, unless that has been done; without SOURCE the data must be in DATA_DIR."""
    data_dir, benchmark = settings["DATA_DIR"], settings["BENCHMARK"]
    source = Path(settings.get("SOURCE") or default_folder(f"sources/{dataset}"))
    if not source.exists():
        if "SOURCE" in settings:
            raise TicError(f"SOURCE is {source}, which does not exist (as seen from {Path.cwd()})")
        if "://" not in data_dir and not Path(data_dir, "tic", benchmark).exists():
            packed = f"{data_dir}/tic/{benchmark} (DATA_DIR)"
            raise TicError(f"there is neither {source} (SOURCE) to make the data of, nor {packed}")
        return
    if dry_run:
        return
    lists = f"{data_dir}/lists/{benchmark}"
    kind = "--annotations-path" if dataset == "redcaps" else "--csv-path"
    flags = [kind, str(source / DATASETS[dataset]), "--output-path", lists, *["--overwrite"] * overwrite]
    flags += ["--benchmark", benchmark] if dataset == "yfcc15m" else []
    create(f"tic-{dataset}/create_splits.py", *flags, "-j", str(CORES), *make_flags(SPLITS, settings))
    pack_images(lists, str(source / "images"), data_dir, overwrite)


def cut_table(settings: dict[str, str], overwrite: bool) -> None:
    """Cut the user's own TABLE by time into lists, unless that has been done; BENCHMARK is the file beside them."""
    path = Path(settings["BENCHMARK"])
    if path.name != BENCHMARK_FILE:
        raise TicError(f"TABLE needs BENCHMARK=LISTS/{BENCHMARK_FILE}, the file that is made of it, not {str(path)!r}")
    flags = ["--name", path.parent.absolute().name, "--output-path", str(path.parent), *["--overwrite"] * overwrite]
    flags += ["-j", str(CORES), *make_flags([*COLUMNS, *SPLITS], settings)]
    create("create_splits.py", settings["TABLE"], *flags)


def pack_images(lists: str, images: str, data_dir: str, overwrite: bool) -> None:
    """Pack the images of the lists that create_splits.py has made into shards, unless that has been done."""
    flags = ["--csv-path", lists or ".", "--image-path", images, "--output-path", data_dir, "-j", str(CORES)]
    create("create_tars.py", *flags, *["--overwrite"] * overwrite)


def create(script: str, *flags: str, stdout: int | None = None) -> None:
    """Run a script of dataset_creation/."""
    start([sys.executable, ROOT / "dataset_creation" / script, *flags], stdout)


def start(command: list[str | Path], stdout: int | None = None) -> None:
    """Run a command that reports its own errors, and exit as it does if it fails; it ends if this process does."""
    end = functools.partial(end_with, os.getpid(), signal.SIGTERM)  # torchrun then ends its processes
    process = subprocess.Popen(command, stdout=stdout, preexec_fn=end)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    run_main(main)

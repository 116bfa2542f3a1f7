#!/usr/bin/env bash
# Sets up everything that the scripts need: .venv/ (pinned packages, and this checkout on Python's path) and open_clip/
# (OpenCLIP 2.24.0, the sources of commit 73fa7f03a33da53653f61841eb6d69aef161e521, with open_clip.patch applied; a clone
# of that commit is used as it is). Again is a moment. Needs python3 >= 3.11 (PYTHON), git and a package index.
#
#   bash setup.sh                   # the packages of requirements.txt: training, evaluation, reports, TiC-Emoji, S3
#   bash setup.sh --all             # those of requirements-all.txt: also Ray, wandb, TensorBoard, gs://, az://, the tests'
#   bash setup.sh --models          # also open_clip_models/: OpenCLIP 3.3.0, for scripts/evaluate.py to know its models
#   bash setup.sh --datacomp        # --all, and datacomp/: DATACOMP_GIT at its pinned commit with datacomp.patch applied
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ ${1:-} != @(-h|--help) ]] || source scripts/cli.sh

PYTHON=${PYTHON:-python3} DATACOMP_GIT=${DATACOMP_GIT:-https://github.com/mlfoundations/datacomp.git}
DATACOMP=7fdb5c653e70d9c6fcc63ac7c8c66843e7c6f3e8
MODELS="open_clip_torch==3.3.0 --hash=sha256:c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce"
OPEN_CLIP="open_clip_torch==2.24.0 --hash=sha256:2537dbe76c8008caa46652bc97cb32bceeae56baff6289e7b4eb22539a80c801"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
uv() { .venv/bin/python -m uv --quiet "$@" --python .venv/bin/python; }
# git without the user's settings, which change what a diff looks like; the files may be another user's, or read-only.
plain_git() { GIT_CONFIG_GLOBAL=/dev/null GIT_OPTIONAL_LOCKS=0 git -c safe.directory='*' -C "$@"; }
# patched FOLDER PATHS...: PATHS in FOLDER have the changes of FOLDER.patch and no others. applied.patch remembers what
# was applied, so a newer patch replaces it and edits by hand are kept.
patched() {
    local folder=$1 applied=$1/.git/applied.patch changes
    [ -d "$folder/.git" ] || fail "$folder/ is not a git checkout; delete it and run setup.sh again"
    changes=$(plain_git "$folder" diff --no-ext-diff -U1 -- "${@:2}" | sed '/^index /d')
    if [ "$changes" != "$(< "$folder.patch")" ]; then
        [ -z "$changes" ] || [ "$changes" = "$(cat "$applied" 2>/dev/null)" ] ||
            fail "$folder/ has edits that are not in $folder.patch: keep them as CONTRIBUTING.md says, or delete $folder/"
        plain_git "$folder" checkout --quiet -- "${@:2}" && plain_git "$folder" apply "../$folder.patch" ||
            fail "$folder.patch does not fit $folder/: is it the pinned commit?"
    fi
    cmp -s "$folder.patch" "$applied" || cp "$folder.patch" "$applied"
}

[[ "$*" = @(|--all|--datacomp|--models) ]] || fail "unknown argument $*; there is --all, --datacomp or --models, or none"
exec 9< .  # a lock until this shell ends; none where flock is missing (macOS) or the file system has no locks
! command -v flock >/dev/null || flock -n 9 2>/dev/null || if [ $? = 1 ]; then say "waiting for another setup.sh" && flock 9; fi

# What has had all packages keeps them. The stamp is written last, so an interrupted installation is done again. The scripts in .venv/bin and the .pth have
# relative paths: the checkout can be moved. Neither list has open_clip_torch, which would hide the patched one.
list=requirements.txt
[[ "$*" != @(--all|--datacomp) ]] && ! grep -qs '^ray==' .venv/tic-clip.stamp || list=requirements-all.txt
if ! cmp -s "$list" .venv/tic-clip.stamp || ! [ -x .venv/bin/python ] || [ -e .venv/lib/python3*/site-packages/open_clip ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON does not exist; set PYTHON=/path/to/python3.11"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11; set PYTHON=/path/to/python3.11"
    say "installing the packages of $list into .venv: a minute, and 6 GB with torch's CUDA libraries"
    rm -f .venv/tic-clip.stamp
    [ -x .venv/bin/python ] && grep -qs '^relocatable = true' .venv/pyvenv.cfg || "$PYTHON" -m venv --clear .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
    uv venv --relocatable --seed --allow-existing .venv
    uv pip sync --compile-bytecode "$list"
    printf '../../../../%s\n' '' open_clip/src > "$(echo .venv/lib/python3*/site-packages)/tic_clip_open_clip.pth"
    cp "$list" .venv/tic-clip.stamp
fi
if [ ! -e open_clip ]; then
    rm -rf open_clip.tmp
    uv pip install --no-deps --link-mode copy --target open_clip.tmp/src --requirements - <<< "$OPEN_CLIP"
    rm -rf open_clip.tmp/src/{*.dist-info,.lock}
    git init --quiet open_clip.tmp && plain_git open_clip.tmp add --all && mv open_clip.tmp open_clip
fi
patched open_clip src
if [ "$*" = --models ] && [ ! -e open_clip_models ]; then
    rm -rf open_clip_models.tmp
    uv pip install --no-deps --link-mode copy --target open_clip_models.tmp --requirements - <<< "$MODELS"
    mv open_clip_models.tmp open_clip_models
fi
if [ "$*" = --datacomp ] && [ ! -e datacomp ]; then
    rm -rf datacomp.tmp
    git clone --quiet --no-checkout "$DATACOMP_GIT" datacomp.tmp && git -C datacomp.tmp checkout --quiet "$DATACOMP" ||
        fail "$DATACOMP_GIT can't be cloned at ${DATACOMP::8} (DATACOMP_GIT can name another place), so there is no datacomp/; all else is ready"
    mv datacomp.tmp datacomp
fi
[ ! -e datacomp ] || patched datacomp evaluate.py resharder.py scale_configs.py train.py
say "ready:" $(ls -d .venv open_clip datacomp open_clip_models 2>/dev/null)

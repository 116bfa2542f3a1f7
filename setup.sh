#!/usr/bin/env bash
# Sets up everything that the scripts need: .venv/ (pinned packages and tic_clip itself) and open_clip/ (the pinned
# OpenCLIP with open_clip.patch applied). Again is a few seconds. Needs python3 >= 3.11, git and a package index.
#
#   bash setup.sh
#   bash setup.sh --datacomp        # and datacomp/: DataComp's pinned checkout with datacomp.patch applied
#
# OpenCLIP is release 2.24.0, whose wheel holds the sources of commit 73fa7f03a33da53653f61841eb6d69aef161e521. A clone
# of that commit in open_clip/ is taken as it is, and patched if it is not yet. DataComp is commit
# 7fdb5c653e70d9c6fcc63ac7c8c66843e7c6f3e8 of DATACOMP_GIT (default: https://github.com/mlfoundations/datacomp.git).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ ${1:-} != @(-h|--help) ]] || source scripts/cli.sh

PYTHON=${PYTHON:-python3}
DATACOMP=7fdb5c653e70d9c6fcc63ac7c8c66843e7c6f3e8

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }
# Write a file from standard input at once, and only if it changes: another process may be reading it.
put() { cat > "$1.$$" && { cmp --silent "$1.$$" "$1" && rm "$1.$$" || mv "$1.$$" "$1"; }; }
sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

[ "$*" = "" ] || [ "$*" = --datacomp ] || fail "unknown argument $*; there is --datacomp, or none"
command -v git >/dev/null || fail "git is needed and was not found"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11; set PYTHON=/path/to/python3.11"

# 1. Packages. The stamp is written last, so an interrupted installation is done again.
stamp=$(cat requirements.txt pyproject.toml | sha256 | cut -d' ' -f1)
if [ "$(cat .venv/tic-clip.stamp 2>/dev/null)" != "$stamp" ]; then
    rm -f .venv/lib/python*/site-packages/tic_clip_open_clip.pth  # step 4's; pip's builds can't bear one from before
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv .venv
    say "installing the packages of requirements.txt into .venv: minutes, and 6 GB with torch's CUDA libraries"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
    printf '%s\n' "$stamp" > .venv/tic-clip.stamp
fi
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

# 2. OpenCLIP's source: copied from the wheel's files only if each of them is what was recorded.
if [ ! -e open_clip ]; then
    root=$PWD
    (cd "$site" && sha256 --check --quiet "$root/open_clip.sha256") >&2 ||
        fail "these files of open_clip_torch 2.24.0 are not the released ones; nothing was patched. To reinstall: .venv/bin/python -m pip install --force-reinstall --no-deps open_clip_torch==2.24.0"
    say "unpacking OpenCLIP 2.24.0 into open_clip/"
    rm -rf open_clip.tmp && mkdir -p open_clip.tmp/src
    cut -c67- open_clip.sha256 | tar -C "$site" -cf - -T - | tar -C open_clip.tmp/src -xf -
    git -C open_clip.tmp init --quiet && git -C open_clip.tmp add --all
    mv open_clip.tmp open_clip
fi

# 3. The patch. applied.patch remembers what was applied, so a newer patch replaces it and edits by hand are kept.
#    patched FOLDER COMMIT PATHS...: PATHS in FOLDER have the changes of FOLDER.patch and no others.
patched() {
    local folder=$1 commit=$2 applied=$1/.git/applied.patch
    shift 2
    changes() { git -C "$folder" diff --no-ext-diff -U1 -- "$@" | sed '/^index /d'; }
    [ -d "$folder/.git" ] || fail "$folder/ is not a git checkout; delete it and run setup.sh again"
    if ! cmp --silent "$folder.patch" <(changes "$@"); then
        if [ -s "$applied" ] && cmp --silent "$applied" <(changes "$@"); then
            git -C "$folder" checkout --quiet -- "$@"
        elif [ -n "$(changes "$@")" ]; then
            fail "$folder/ has edits that are not in $folder.patch: keep them as CONTRIBUTING.md says, or delete $folder/"
        fi
        git -C "$folder" apply "../$folder.patch" || fail "$folder.patch does not fit $folder/: is it commit ${commit::8}?"
    fi
    put "$applied" < "$folder.patch"
}
patched open_clip 73fa7f03a33da53653f61841eb6d69aef161e521 src

# 4. This checkout's tic_clip and patched OpenCLIP go before all others for every Python of .venv, wherever it is moved;
#    not in pip's isolated builds, which take what comes after the first paths for the system's and drop it.
printf 'import os, sys; sys.path[:0] = [] if "PIP_BUILD_TRACKER" in os.environ else [r"""%s""", r"""%s"""]\n' "$PWD" "$PWD/open_clip/src" |
    put "$site/tic_clip_open_clip.pth"
ready=".venv/ and open_clip/ (patched)"

# 5. DataComp, on request; one that is there gets a newer patch.
if [ "$*" = --datacomp ] && [ ! -e datacomp ]; then
    address=${DATACOMP_GIT:-https://github.com/mlfoundations/datacomp.git}
    rm -rf datacomp.tmp
    git clone --quiet --no-checkout "$address" datacomp.tmp && git -C datacomp.tmp checkout --quiet "$DATACOMP" || {
        rm -rf datacomp.tmp
        fail "$address can't be cloned at ${DATACOMP::8} (DATACOMP_GIT can name another place), so there is no datacomp/ with its train.py, evaluate.py and resharder.py; all else is ready"
    }
    mv datacomp.tmp datacomp
fi
if [ -e datacomp ]; then
    patched datacomp "$DATACOMP" evaluate.py resharder.py scale_configs.py train.py
    ready=".venv/, open_clip/ and datacomp/ (patched)"
fi
say "ready: $ready"

#!/usr/bin/env bash
# Fetches the released TiC-CLIP models (ViT-B-16, trained on TiC-DataComp at scale xlarge) from the Hugging Face Hub:
# {basic,bestpool}-{cumulative,sequential,oracle}, each with a checkpoint per year.
#
#   bash scripts/fetch_models.sh data/models                                  # all six
#   bash scripts/fetch_models.sh data/models basic-cumulative                 # one
#   bash scripts/fetch_models.sh data/models basic-cumulative 2016 2022       # some years of it
#
# Writes DIR/TiC-CLIP-basic-cumulative/checkpoints/2016.pt and so on. Run it again to resume; files that have not changed
# on the hub are kept. huggingface_hub's own variables apply: HF_ENDPOINT (a mirror), HF_TOKEN (a login),
# HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT (seconds).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ${1:-} != @(-h|--help) ]] || source "$root/scripts/cli.sh"

bash "$root/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/fetch_models.py" "$@"

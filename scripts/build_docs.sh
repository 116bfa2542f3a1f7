#!/usr/bin/env bash
# Builds a site from README.md and docs/ in site/html/ with mkdocs-material, which uv fetches from the package index.
#
#   bash scripts/build_docs.sh
#   .venv/bin/python -m http.server -d site/html
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/cli.sh

bash setup.sh
rm -rf site
mkdir -p site
cp -r docs site/pages
sed 's#](docs/#](#g' README.md > site/pages/index.md
.venv/bin/python -m uv tool run --with 'mkdocs-material<10' 'mkdocs@1.6.1' build --strict

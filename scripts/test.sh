#!/usr/bin/env bash
# Lint (shell too), type-check and test; makes .venv where there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/shellcheck scripts/*.sh scripts/paper/*.sh scripts/paper/train.slurm .ci/run
.venv/bin/python scripts/make_tables.py --check
.venv/bin/python -m pytest

#!/usr/bin/env bash
# The checks on CUDA as one JSON: loss against float64, kernels, step, loader, NCCL. Eight minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
exec timeout 480 "$python" scripts/gpu_check.py "$@"

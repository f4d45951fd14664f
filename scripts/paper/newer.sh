#!/usr/bin/env bash
# All suites that are newer than the paper, or not in it.
# Needs data.sh coco suites, or WORLD=shapes. Trains what is missing.
# Prints the paper's figures, independent ones, ours, and whether ours are within tolerance.
. "$(dirname "$0")/common.sh"
table newer

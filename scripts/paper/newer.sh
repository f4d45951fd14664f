#!/usr/bin/env bash
# All suites that are newer than the paper, or not in it.
# Needs data.sh coco suites, or WORLD=shapes.
. "$(dirname "$0")/common.sh"
table newer

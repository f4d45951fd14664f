#!/usr/bin/env bash
# All suites that are newer than the paper, or not in it.
# Needs data.sh coco suites, or WORLD=shapes. Trains what is missing; prints the
# suites' tables, then paper / independently measured / ours / difference / within tolerance.
. "$(dirname "$0")/common.sh"
mapfile -t names < <(recipes newer)
table newer "${names[@]}"

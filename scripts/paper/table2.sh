#!/usr/bin/env bash
# Table 2: VL-CheckList.
# Needs data.sh coco vg vl_checklist, or WORLD=shapes. Trains what is missing; prints the
# suites' tables, then paper / independently measured / ours / difference / within tolerance.
. "$(dirname "$0")/common.sh"
mapfile -t names < <(recipes table2)
table table2 "${names[@]}"

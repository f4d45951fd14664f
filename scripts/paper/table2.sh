#!/usr/bin/env bash
# Table 2: VL-CheckList.
# Needs data.sh coco vg vl_checklist, or WORLD=shapes. Trains what is missing.
# Prints the paper's figures, independent ones, ours, and whether ours are within tolerance.
. "$(dirname "$0")/common.sh"
table table2

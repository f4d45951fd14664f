#!/usr/bin/env bash
# Table 2: VL-CheckList.
# Needs data.sh coco vg vl_checklist, or WORLD=shapes.
. "$(dirname "$0")/common.sh"
table table2

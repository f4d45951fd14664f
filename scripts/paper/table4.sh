#!/usr/bin/env bash
# Table 4, the ablation: CLIP, fine-tuned, negatives, + imc, + cmr fixed, max, adaptive, all.
# Needs data.sh coco karpathy aro valse vl_checklist, or WORLD=shapes. Trains what is missing; prints the
# suites' tables, then paper / independently measured / ours / difference / within tolerance.
. "$(dirname "$0")/common.sh"
mapfile -t names < <(recipes table4)
table table4 "${names[@]}"

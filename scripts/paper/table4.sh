#!/usr/bin/env bash
# Table 4, the ablation: CLIP, fine-tuned, negatives, + imc, + cmr fixed, max, adaptive, all.
# Needs data.sh coco karpathy aro valse vl_checklist, or WORLD=shapes.
. "$(dirname "$0")/common.sh"
table table4

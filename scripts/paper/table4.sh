#!/usr/bin/env bash
# Table 4, the ablation: CLIP, fine-tuned, negatives, + imc, + cmr fixed, max, adaptive, all.
# Needs data.sh coco karpathy aro valse vl_checklist, or WORLD=shapes. Trains what is missing.
# Prints the paper's figures, independent ones, ours, and whether ours are within tolerance.
. "$(dirname "$0")/common.sh"
table table4

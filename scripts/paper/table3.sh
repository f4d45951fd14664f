#!/usr/bin/env bash
# Table 3: SugarCrepe.
# Needs data.sh coco sugarcrepe, or WORLD=shapes. Trains what is missing.
# Prints the paper's figures, independent ones, ours, and whether ours are within tolerance.
. "$(dirname "$0")/common.sh"
table table3

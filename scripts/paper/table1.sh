#!/usr/bin/env bash
# Table 1: ARO and VALSE.
# Needs data.sh coco karpathy aro valse, or WORLD=shapes. Trains what is missing.
# Prints the paper's figures, independent ones, ours, and whether ours are within tolerance.
. "$(dirname "$0")/common.sh"
table table1

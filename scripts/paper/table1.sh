#!/usr/bin/env bash
# Table 1: ARO and VALSE.
# Needs data.sh coco karpathy aro valse, or WORLD=shapes.
. "$(dirname "$0")/common.sh"
table table1

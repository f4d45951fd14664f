#!/usr/bin/env bash
# Table 1: ARO and VALSE.
# Needs data.sh coco karpathy aro valse, or WORLD=shapes. Trains what is missing; prints the
# suites' tables, then paper / independently measured / ours / difference / within tolerance.
. "$(dirname "$0")/common.sh"
mapfile -t names < <(recipes table1)
table table1 "${names[@]}"

#!/usr/bin/env bash
# Table 3: SugarCrepe.
# Needs data.sh coco sugarcrepe, or WORLD=shapes. Trains what is missing; prints the
# suites' tables, then paper / independently measured / ours / difference / within tolerance.
. "$(dirname "$0")/common.sh"
mapfile -t names < <(recipes table3)
table table3 "${names[@]}"

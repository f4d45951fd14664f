#!/usr/bin/env bash
# Table 3: SugarCrepe.
# Needs data.sh coco sugarcrepe, or WORLD=shapes.
. "$(dirname "$0")/common.sh"
table table3

#!/usr/bin/env bash
# What it costs: retrieval, zero-shot, linear probe; the rows of the project page.
# Needs data.sh coco karpathy flickr30k zeroshot probe, or WORLD=shapes. Trains what is missing; prints the
# suites' tables, then paper / independently measured / ours / difference / within tolerance.
. "$(dirname "$0")/common.sh"
mapfile -t names < <(recipes general)
table general "${names[@]}"

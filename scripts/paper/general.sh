#!/usr/bin/env bash
# What it costs: retrieval, zero-shot, linear probe; the rows of the project page.
# Needs data.sh coco karpathy flickr30k zeroshot probe, or WORLD=shapes.
. "$(dirname "$0")/common.sh"
table general

#!/usr/bin/env bash
# Figure 5: ARO over epochs by threshold (a) and cap (c), thresholds (b) and loss parts (d) over steps.
# Needs data.sh coco karpathy aro, or WORLD=shapes. Prints one row for each epoch of each run and
# where the images are (with matplotlib), then the comparison.
. "$(dirname "$0")/common.sh"
mapfile -t names < <(recipes figure5)
pass bash "$here/train.sh" "${names[@]}"
options=() folders=()
for seed in $SEEDS; do for recipe in "${names[@]}"; do
  folders+=("$(folder "$recipe" "$seed")")
  for epoch in "$(folder "$recipe" "$seed")"/epoch_*.pt; do
    name=${epoch##*_}
    options+=(--ckpt "$(label "$recipe epoch ${name%.pt}" "$seed")=$epoch")
  done
done; done
alone scripts/plot.py "${folders[@]}" --out "$OUT/figure5" || echo "figure5: no figures"
score figure5 "${options[@]}"

#!/usr/bin/env bash
# Fine-tune CLIP by recipes of recipes.tsv: bash scripts/paper/train.sh RECIPE...
# Needs the data of data.sh coco, nothing with WORLD=shapes. Prints train.py's progress; runs are
# in $OUT/RECIPE.SEED. A run that was cut off goes on, one that is done is left alone.
. "$(dirname "$0")/common.sh"
known=$(grep -v '^#' "$here/recipes.tsv" | cut -f1 | paste -sd' ')
[ $# -gt 0 ] || fail "name recipes: $known"
for recipe in "$@"; do
  [[ " $known " == *" $recipe "* ]] ||
    fail "$recipe: is not in scripts/paper/recipes.tsv, which has $known"
done
data=()
if [ "$WORLD" = coco ]; then
  pass bash "$here/negatives.sh"
  data=(--data "$manifest" --images "$images")
fi
for seed in $SEEDS; do
  base "$seed" "${data[@]}"
  for recipe in "$@"; do
    read -ra options <<< "$(awk -F'\t' -v r="$recipe" '$1 == r {print $3}' "$here/recipes.tsv")"
    train "$(folder "$recipe" "$seed")" "${options[@]}" "${data[@]}" "${shared[@]}" \
      --pretrained "$start"
  done
done

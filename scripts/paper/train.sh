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
  bash "$here/negatives.sh"
  data=(--data "$manifest" --images "$images")
fi
# Without a GPU the shapes world trains on every core, one thread each: no thread waits for another.
if [ "$WORLD" = shapes ] && [ "$GPUS" = 0 ]; then JOBS=$(nproc); export OMP_NUM_THREADS=1; else JOBS=1; fi
running=0
# Start `train OUT OPTIONS...` beside the others, at most JOBS at a time; the first failure ends all.
start() {
  [ "$running" -lt "$JOBS" ] || finish
  train "$@" 2>&1 | sed -u "s|^|$(basename "$1"): |" &
  running=$((running + 1))
}
finish() { wait -n || exit; running=$((running - 1)); }
finish_all() { while [ "$running" -gt 0 ]; do finish; done; }
for step in base "$@"; do
  [ "$step" != base ] || [ -z "$PRETRAINED" ] || continue
  read -ra options <<< "$(awk -F'\t' -v r="$step" '$1 == r {print $3}' "$here/recipes.tsv")"
  for seed in $SEEDS; do
    common=("${data[@]}" ${MODEL:+--model "$MODEL"} --seed "$seed" "${train_options[@]}")
    [ "$GPUS" = 0 ] || common+=(--precision bf16)
    [ "$step" = base ] || common+=(--pretrained "${PRETRAINED:-$(folder base "$seed")/latest.pt}")
    start "$(folder "$step" "$seed")" "${options[@]}" "${common[@]}"
  done
  [ "$step" != base ] || finish_all
done
finish_all

#!/usr/bin/env bash
# Fine-tune CLIP by recipes of recipes.tsv: bash scripts/paper/train.sh RECIPE...
# Needs data.sh coco, or WORLD=shapes. Runs are in $OUT/RECIPE.SEED, and resume; skips what is done.
. "$(dirname "$0")/common.sh"
known=$(grep -v '^#\|^[a-z-]*-shapes' "$here/recipes.tsv" | cut -f1 | paste -sd' ')
[ $# -gt 0 ] || fail "name recipes: $known"
for recipe in "$@"; do
  [[ " $known " == *" $recipe "* ]] || fail "$recipe: is not in recipes.tsv, which has $known"
done
data=()
if [ "$WORLD" = coco ]; then
  pass bash "$here/negatives.sh"
  data=(--data "$manifest" --images "$images")
fi
[ "$1" != base ] || shift
cores=1 running=0
[ "$WORLD" = coco ] || [ "$GPUS" -gt 0 ] || cores=$(nproc)  # small models train side by side
stop() { jobs -p | xargs -r kill 2> /dev/null || true; wait; exit "$1"; }
trap 'stop 143' TERM INT HUP
# Wait until fewer than N runs go on; a run that fails stops the others.
until_fewer() { for ((; running >= $1; running--)); do wait -n || stop $?; done; }
for recipe in base "$@"; do
  [ "$recipe" != base ] || [ -z "$PRETRAINED" ] || continue
  read -ra options <<< "$(row "$recipe") $(row "$recipe-$WORLD")"
  seeds=0 jobs=1
  [ "$recipe" = base ] || { read -ra seeds <<< "$SEEDS"; jobs=$((${#seeds[@]} * $#)); }
  jobs=$((jobs < cores ? jobs : cores))
  [ "$cores" = 1 ] || export OMP_NUM_THREADS=$((cores / jobs))
  for seed in "${seeds[@]}"; do
    until_fewer "$jobs"
    share "$seed"
    [ "$recipe" = base ] || shared+=(--pretrained "$start")
    train "$(folder "$recipe" "$seed")" "${options[@]}" "${data[@]}" "${shared[@]}" 2>&1 |
      sed -u "s/^/$recipe.$seed: /" &
    running=$((running + 1))
  done
  [ "$recipe" != base ] || until_fewer 1  # the others start from it
done
until_fewer 1

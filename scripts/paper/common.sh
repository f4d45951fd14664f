# shellcheck shell=bash disable=SC2034
# What the scripts of this folder share; sourced, never run. README.md lists what a user may set.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
WORLD=${WORLD:-coco} SPLIT=${SPLIT:-train2014} ROOT=${ROOT:-data} ENGINE=${ENGINE:-}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
GPUS=${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
case $WORLD in
  coco) OUT=${OUT:-runs/paper} SEEDS=${SEEDS:-0}
    MODEL=${MODEL:-ViT-B-32-quickgelu} PRETRAINED=${PRETRAINED-openai} ;;
  shapes) OUT=${OUT:-runs/shapes} SEEDS=${SEEDS:-1 2 3} MODEL=${MODEL:-} PRETRAINED=${PRETRAINED-} ;;
  *) echo "WORLD=$WORLD: is neither coco nor shapes" >&2; exit 2 ;;
esac
fail() { echo "$(basename "$0"): error: $*" >&2; exit 2; }
[[ $GPUS =~ ^[0-9]+$ ]] || fail "GPUS=$GPUS: is no number of processes"
[ "$WORLD" = coco ] || [ -z "$ENGINE" ] ||
  fail "ENGINE=$ENGINE: WORLD=shapes draws its own negatives; leave ENGINE out"
[ -z "${RELEASED:-}" ] || [ -f "$RELEASED" ] || fail "RELEASED=$RELEASED: no such checkpoint"
case $SPLIT in
  train2014 | train2017) captions=$ROOT/annotations/captions_$SPLIT.json images=$ROOT/$SPLIT ;;
  karpathy) captions=$ROOT/karpathy/train.jsonl images=$ROOT ;;
  *) echo "SPLIT=$SPLIT: is none of train2014, karpathy, train2017" >&2; exit 2 ;;
esac
manifest=$ROOT/negatives/$SPLIT${ENGINE:+.$ENGINE}.jsonl
read -ra train_options <<< "${TRAIN_OPTIONS:-}"
read -ra eval_options <<< "${EVAL_OPTIONS:-}"

# Run a command; a signal to this shell alone stops the command too, and then this script.
pass() {
  local code=0 child='' stopped=''
  trap 'stopped=1; [ -z "$child" ] || kill "$child" 2> /dev/null || true' TERM INT HUP
  "$@" &
  child=$!
  [ -z "$stopped" ] || kill "$child"
  wait "$child" || code=$?
  while [ -n "$stopped" ] && kill -0 "$child" 2> /dev/null; do wait "$child" || code=$?; done
  trap - TERM INT HUP
  [ -z "$stopped" ] || exit "$code"
  return "$code"
}

# Run train.py or evaluate.py on all GPUs; LAUNCH=srun starts one process a task (train.slurm).
launch() {
  if [ -n "${LAUNCH:-}" ]; then pass "$LAUNCH" "$PYTHON" "$@"
  elif [ "$GPUS" -gt 1 ]; then
    pass "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" "$@"
  else pass "$PYTHON" "$@"; fi
}

# Run one process, in a SLURM job too, whose variables would make it one of many.
alone() { pass env -u SLURM_PROCID -u SLURM_NTASKS -u SLURM_LOCALID "$PYTHON" "$@"; }

# train OUT OPTIONS...: run train.py into the folder OUT, unless these very options are done there.
train() {
  local out=$1; shift
  if [ -f "$out/latest.pt" ] && [ "$*" = "$(cat "$out.done" 2>/dev/null)" ]; then
    echo "$out is done"; return
  fi
  launch train.py "$@" --out "$out"
  echo "$*" > "$out.done"
}

# share SEED: set `shared`, options of all runs of a seed, and `start`, the weights that they start
# from: PRETRAINED, or else the base of train.sh.
share() {
  shared=(${MODEL:+--model "$MODEL"} --seed "$1" "${train_options[@]}")
  [ "$GPUS" = 0 ] || shared+=(--precision bf16)
  start=${PRETRAINED:-$(folder base 0)/latest.pt}
}

# The options of a recipe; those of RECIPE-WORLD come on top.
row() { awk -F'\t' -v r="$1" '$1 == r {print $3}' "$here/recipes.tsv"; }

# The recipes of a table of the paper, in the order of recipes.tsv.
recipes() {
  if [ -n "${RECIPES:-}" ]; then xargs -n1 <<< "$RECIPES"; return; fi
  awk -F"\t" -v t="$1" '(","$2",") ~ (","t",") {print $1}' "$here/recipes.tsv"
}

# A run's folder and its name in tables: RECIPE of SEED.
folder() { echo "$OUT/$1${ENGINE:+-on-$ENGINE}.$2"; }
label() {
  local name="$1${ENGINE:+ on $ENGINE negatives}"
  [ "${SEEDS/ /}" = "$SEEDS" ] && echo "$name" || echo "$name seed $2"
}

# The checkpoints of these recipes as options of evaluate.py, the one they start from first.
checkpoints() {
  local seed recipe
  if [ -e "$PRETRAINED" ]; then printf '%s\n' --ckpt "CLIP=$PRETRAINED"
  elif [ -n "$PRETRAINED" ]; then printf '%s\n' --ckpt "CLIP=$MODEL:$PRETRAINED"
  else printf '%s\n' --ckpt "base=$(folder base 0)/latest.pt"; fi
  [ -z "${RELEASED:-}" ] || printf '%s\n' --ckpt "released weights=$RELEASED"
  for recipe in "$@"; do for seed in $SEEDS; do
    printf '%s\n' --ckpt "$(label "$recipe" "$seed")=$(folder "$recipe" "$seed")/latest.pt"
  done; done
}

# The JSON of record of a table.
record() { if [ -n "${RECORDS:-}" ]; then echo "$RECORDS/$1-$WORLD.json"; else echo "$OUT/$1/record.json"; fi; }

# score NAME OPTIONS...: evaluate the checkpoints among the options on the suites of the group
# NAME, unless that was done with these very weights; then compare with what is published.
score() {
  local out=$OUT/$1 results=$OUT/$1/results.json name=$1 given new code x
  local suite=(--suite "$1" --root "$ROOT"); shift
  [ "$WORLD" = coco ] || suite=(--suite shapes)
  given=$(printf '%s\n' "$@" "${eval_options[@]}" "${ALLOW_MISSING:-}")
  new=$(for x in "$@"; do [ ! "${x#*=}" -nt "$results" ] || echo "$x"; done)
  # What was missing may be there now, so what was scored in part is scored again.
  if [ -z "${ALLOW_MISSING:-}" ] && [ -f "$results" ] && [ -z "$new" ] && [ "$given" = "$(cat "$out/given" 2>/dev/null)" ]; then
    cat "$out/results.md"
  else
    mkdir -p "$out"
    [ -z "${RELEASED:-}" ] || set -- "$@" --model "$MODEL"
    launch evaluate.py "$@" "${suite[@]}" --out "$out" --overwrite --cache "$OUT/features" \
      ${ALLOW_MISSING:+--allow-missing} "${eval_options[@]}" \
      || { code=$?; results=$out/none; [ -n "${ALLOW_MISSING:-}" ] || exit "$code"; }
    echo "$given" > "$out/given"
  fi
  alone scripts/make_tables.py --judge "$name" --world "$WORLD" --results "$results" \
    --labels "$(printf '%s\n' "$@" | sed -n 's/=.*//p' | paste -sd,)" --record "$(record "$name")"
}

# table NAME: train what is missing of its recipes, score them, compare them.
table() {
  local names options
  mapfile -t names < <(recipes "$1")
  pass bash "$here/train.sh" "${names[@]}"
  mapfile -t options < <(checkpoints "${names[@]}")
  score "$1" "${options[@]}"
}

#!/usr/bin/env bash
# CE-CLIP+: COCO, CC3M and Visual Genome, each with its share of a batch.
# Needs data.sh coco vg cc3m, and the suites of tables 1 to 3. WEIGHTS are the shares of COCO, CC3M,
# VG (default: by size). The paper's data and weights are not public, so rows are only shown.
. "$(dirname "$0")/common.sh"
[ "$WORLD" = coco ] || fail "needs photos; WORLD=$WORLD has one source only"
read -ra weights <<< "${WEIGHTS:-}"
[[ ${#weights[@]} = [03] ]] || fail "WEIGHTS=$WEIGHTS: wants one each for COCO, CC3M, VG"
pass bash "$here/negatives.sh"
[ -n "$PRETRAINED" ] || pass bash "$here/train.sh" base
manifests=("$manifest" "$ROOT/negatives/cc3m.jsonl" "$ROOT/negatives/vg.jsonl")
for name in cc3m vg; do
  [ -d "$ROOT/$name" ] || fail "$ROOT/$name is not there: bash scripts/paper/data.sh $name"
  if [ ! -f "$ROOT/negatives/$name.jsonl" ]; then
    alone data.py "$name" "$ROOT/$name" --out "$ROOT/negatives/$name.captions.jsonl" --overwrite
    alone negatives.py "$ROOT/negatives/$name.captions.jsonl" --workers "$(nproc)" \
      --out "$ROOT/negatives/$name.jsonl" --stats
  fi
done
for i in "${!weights[@]}"; do manifests[i]+=":${weights[i]}"; done
options=()
for seed in $SEEDS; do
  out=$(folder ce-clip-plus "$seed")
  share "$seed"
  train "$out" --recipe ce-clip --data "${manifests[@]}" --images "$images" "$ROOT/cc3m" "$ROOT/vg" \
    "${shared[@]}" --pretrained "$start"
  options+=(--ckpt "$(label ce-clip-plus "$seed")=$out/latest.pt")
done
score ce-clip-plus "${options[@]}"

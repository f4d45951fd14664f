#!/usr/bin/env bash
# Hard negatives of the training captions: bash scripts/paper/negatives.sh
# Needs data.sh coco; prints coverage, how many images decode, how many are test images. Writes
# $ROOT/negatives/SPLIT.jsonl, once (SPLIT.ENGINE.jsonl with ENGINE; released needs --mlm).
. "$(dirname "$0")/common.sh"
mkdir -p "$(dirname "$manifest")"
if [ "$SPLIT" = karpathy ] && [ ! -f "$captions" ]; then
  alone data.py karpathy "$ROOT/karpathy/dataset_coco.json" --splits train restval --out "$captions"
fi
read -ra options <<< "${NEGATIVES_OPTIONS:-}"
if [ ! -f "$manifest" ]; then
  echo "${options[*]}" > "$manifest.options"
  alone negatives.py "$captions" --out "$manifest" --stats --workers "$(nproc)" \
    ${ENGINE:+--engine "$ENGINE"} "${options[@]}"
elif [ "${NEGATIVES_OPTIONS+set}" ] && [ "${options[*]}" != "$(cat "$manifest.options" 2>/dev/null)" ]
then fail "NEGATIVES_OPTIONS=$NEGATIVES_OPTIONS: $manifest was made with others; move it away to make it anew"
fi
if [ ! -f "$manifest.check" ]; then
  code=0
  alone data.py check "$manifest" --images "$images" > "$manifest.check.partial" || code=$?
  cat "$manifest.check.partial"
  [ "$code" = 0 ] || exit "$code"
  mv "$manifest.check.partial" "$manifest.check"
fi

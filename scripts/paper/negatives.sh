#!/usr/bin/env bash
# Hard negatives of the training captions: bash scripts/paper/negatives.sh
# Needs the annotations of data.sh coco and the images of SPLIT; prints what was made, how many
# images decode, and how many of them stand in a test. Writes $ROOT/negatives/SPLIT.jsonl, once
# (SPLIT.ENGINE.jsonl with ENGINE; released needs spacy, transformers and a masked model, see --mlm).
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
  alone data.py check "$manifest" --images "$images" | tee "$manifest.check.partial"
  mv "$manifest.check.partial" "$manifest.check"
fi

#!/usr/bin/env bash
# Make negatives, install, train a base, a control and CE-CLIP on the shapes world, compare them.
# Typed again it goes on where it was cut off; it deletes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 negatives.py --text "A man riding a brown horse on the beach."  # needs nothing installed
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt matplotlib
export WORLD=shapes OUT=runs/quickstart SEEDS=0
python=.venv/bin/python
score=("$python" evaluate.py --suite shapes --cache "$OUT/features" --ckpt base="$OUT/base.0/latest.pt")
bash scripts/paper/train.sh base
if [ -f $OUT/results/results.md ]; then
  cat $OUT/results/results.md
else
  "${score[@]}"
  bash scripts/paper/train.sh clip ce-clip
  "${score[@]}" --ckpt control=$OUT/clip.0/latest.pt --ckpt ce-clip=$OUT/ce-clip.0/latest.pt \
    --baseline control --out $OUT/results
fi
$python scripts/plot.py $OUT/ce-clip.0 $OUT/results --out $OUT/figures
echo "Runs are in $OUT, tables in $OUT/results, figures in $OUT/figures."

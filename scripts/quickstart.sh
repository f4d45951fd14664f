#!/usr/bin/env bash
# Install, train base, control and CE-CLIP on the shapes world, compare them. Resumes; deletes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt matplotlib
python=.venv/bin/python out=runs/quickstart
$python train.py --recipe clip --steps 400 --out $out/base
for recipe in clip ce-clip; do
  name=$([ $recipe = clip ] && echo control || echo ce-clip)
  $python train.py --recipe $recipe --pretrained $out/base/latest.pt --seed 1 --steps 1000 --out $out/"$name"
done
if [ -f $out/results/results.md ]; then
  cat $out/results/results.md
else
  $python evaluate.py --ckpt $out/base/latest.pt --ckpt $out/control/latest.pt \
    --ckpt $out/ce-clip/latest.pt --suite shapes --out $out/results
fi
$python scripts/plot.py $out/ce-clip $out/results --out $out/figures
echo "Runs are in $out; the tables in $out/results, the figures in $out/figures."

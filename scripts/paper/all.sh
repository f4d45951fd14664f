#!/usr/bin/env bash
# Everything: bash scripts/paper/all.sh; needs data.sh coco karpathy flickr30k vg suites.
# Prints every table, then for each how many figures are within tolerance, outside, only shown,
# scored in part, not run. ALLOW_MISSING=1 skips what is not there; a second call continues.
. "$(dirname "$0")/common.sh"
worst=0 summary=() scripts=(table1 table2 table3 table4 figure5 general newer ce-clip-plus)
mkdir -p "$OUT"
[ "$WORLD" = coco ] || scripts=(table4 kinds figure5)  # all tables have the one suite, shapes
for script in "${scripts[@]}"; do
  echo "== $script"
  code=0 record=$(record "$script")
  touch "$OUT/started"
  pass bash "$here/$script.sh" || code=$?
  [ "$code" != 1 ] || [ "$record" -nt "$OUT/started" ] || code=2  # 1 by a crash: no row is outside
  if [ "$code" -le 1 ]; then summary+=("$(sed -n 's/^ "summary": "\(.*\)",$/\1/p' "$record")")
  else summary+=("$script: NOT RUN (exit code $code, see above)"); fi
  [ "$code" -gt "$worst" ] && { [ "$code" = 1 ] || [ -z "${ALLOW_MISSING:-}" ]; } && worst=$code
done
printf '%s\n' "== all" "${summary[@]}"
exit "$worst"

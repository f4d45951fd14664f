#!/usr/bin/env bash
# Download data into ROOT, in the layout of evaluate.py --list:
#   bash scripts/paper/data.sh [--dry-run] coco|coco2017|karpathy|flickr30k|vg|cc3m|SUITE|suites...
# Needs curl, unzip, tar and twice the printed disk space. Prints licence and GB before it starts,
# and exact steps where a form or a shared drive stands before a file. Goes on where it was cut off,
# compares size and checksum where they are published, fetches nothing that is there.
# BASE_URL=URL takes every file from URL/HOST/PATH; DOWNLOADS=FILE is another table of files.
. "$(dirname "$0")/common.sh"
dry=; [ "${1:-}" != --dry-run ] || { dry=1; shift; }
table=${DOWNLOADS:-$here/downloads.tsv}
suites=" $("$PYTHON" -c 'import json; print(*json.load(open("scripts/suites.json")))') "
for tool in curl unzip tar; do
  [ -n "$dry" ] || command -v "$tool" > /dev/null || fail "$tool is not there: install it (apt-get install $tool)"
done
groups=" $(grep -v '^#' "$table" | cut -f1 | tr ',' '\n' | sort -u | paste -sd' ') "
known=$(xargs -n1 <<< "$groups $suites" | sort -u | paste -sd' ')" suites"
[ $# -gt 0 ] || fail "name what to fetch, some of: $known"
for name in "$@"; do
  [[ " $known " == *" $name "* ]] || fail "$name: is none of: $known"
done
asked=" $* "
[[ $asked != *" suites "* ]] || asked+=${suites/ shapes / }

run() { printf '+ %s\n' "${*@Q}"; [ -n "$dry" ] || pass "$@"; }
size() { if [ -e "$1" ]; then wc -c < "$1" | tr -d ' '; else echo 0; fi; }
gigabytes() { awk -v b="$1" 'BEGIN {printf "%.2f GB", b / 1e9}'; }

# Do $1 for every row of the table that is asked for.
each() {
  local of g
  while IFS=$'\t' read -r -u 3 of name url bytes sum how into gives licence steps; do
    archive=$ROOT/downloads/$name
    [[ $url == - ]] || url=${BASE_URL:+$BASE_URL/}${url#"${BASE_URL:+${url%%://*}://}"}
    for g in $asked; do
      if [[ ,$of, == *,$g,* ]]; then "$1"; break; fi
    done
  done 3< <(grep -v '^#' "$table")
}
is_there() { [ -e "$ROOT/$gives" ] && [ ! -e "$archive.unpacking" ]; }

plan() {
  if is_there; then echo "$name: is there: $ROOT/$gives"
  elif [ "$how" = form ]; then printf '%s\n' "$name: by hand; licence: $licence" "  ${steps//ROOT/$place}"
  else
    local text="size not published"
    if [ "$bytes" != - ]; then text=$(gigabytes "$bytes") total=$((total + bytes)); fi
    echo "$name: $text; licence: $licence; $url"
  fi
}

verify() { # FILE BYTES CHECKSUM: hold a file to what is published, or put it aside and say why
  local bytes=$2 sum=$3 why=
  if [ "$bytes" != - ] && [ "$(size "$1")" != "$bytes" ]; then
    why="has $(size "$1") bytes, not $bytes"
  elif [ "$sum" != - ] && ! "${sum%%:*}sum" --check --status <<< "${sum#*:}  $1"; then
    why="its ${sum%%:*} is not ${sum#*:}"
  fi
  # A host that refuses answers with a page, and its download goes on as if it were the file.
  if grep -aqi '^<!doctype html\|^<html' < <(head -n 1 "$1"); then
    why="is a web page, not the file"
  fi
  if [ -n "$why" ]; then
    mv "$1" "$archive.wrong"
    fail "$url: $why; it is kept as $archive.wrong; run again to fetch it anew"
  fi
}

get() {
  if [ "$how" = form ] || is_there; then return; fi
  run mkdir -p "$ROOT/downloads"
  local curl=(curl --fail --location --silent --show-error --output "$archive.partial") code=0
  if [ ! -e "$archive" ]; then
    if [ "$(size "$archive.partial")" != "$bytes" ]; then
      run "${curl[@]}" --continue-at - "$url" || code=$?
      # 22: nothing behind the end of the file; 33: the server cannot go on in the middle.
      case $code in 22 | 33) code=0; run "${curl[@]}" "$url" || code=$? ;; esac
      [ "$code" = 0 ] || fail "$url: cut off after $(size "$archive.partial") bytes (curl says $code); run again to go on"
    fi
    run verify "$archive.partial" "$bytes" "$sum"
    run mv "$archive.partial" "$archive"
  fi
  run touch "$archive.unpacking"
  run mkdir -p "$ROOT/$into"
  case $how in
    zip) run unzip -q -o "$archive" -d "$ROOT/$into" ;;
    flat) run unzip -q -o -j "$archive" -d "$ROOT/$into" ;;
    tar) run tar -xf "$archive" -C "$ROOT/$into" ;;
    repository) run tar -xf "$archive" -C "$ROOT/$into" --strip-components=1 ;;
    file) run cp "$archive" "$ROOT/$gives" ;;
    *) fail "$table: $name: $how is no way to unpack" ;;
  esac || {
    [ "$sum" != - ] || mv "$archive" "$archive.wrong"  # as published, else fetched anew
    fail "$archive: cannot be unpacked, see above (whole disk used, or torn?); run again to go on"
  }
  [ -n "$dry" ] || [ -e "$ROOT/$gives" ] || fail "$archive: holds no $gives; its layout has changed"
  run rm "$archive.unpacking" "$archive"
}

total=0
printf -v place %q "$ROOT"  # as a shell reads it
each plan
for name in $asked; do  # suites that the table has no file of
  if [[ $suites == *" $name "* && $groups != *" $name "* ]]; then
    "$PYTHON" -c 'import json, sys; s = json.load(open("scripts/suites.json"))[sys.argv[1]]
print(f"{sys.argv[1]}: by hand; licence: {s['"'licence'"']}\n  {s['"'where'"']}")' "$name"
  fi
done
echo "to fetch: $(gigabytes "$total") (where the size is published) into $ROOT"
each get

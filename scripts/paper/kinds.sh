#!/usr/bin/env bash
# Which negatives buy what: exchanges, replacements, both (ce-clip), negatives.py's own, none (clip).
# For WORLD=shapes. Trains what is missing; prints the table.
. "$(dirname "$0")/common.sh"
[ "$WORLD" = shapes ] || fail "WORLD=$WORLD: only WORLD=shapes can make negatives of one kind"
table kinds

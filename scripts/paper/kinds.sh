#!/usr/bin/env bash
# Which negatives buy what: exchanges, replacements, both, negatives.py's own, none. For WORLD=shapes.
. "$(dirname "$0")/common.sh"
[ "$WORLD" = shapes ] || fail "WORLD=$WORLD: only WORLD=shapes can make negatives of one kind"
table kinds

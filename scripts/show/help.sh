#!/bin/bash
# List the targets of MAKEFILE and the knobs with their present values.
#
#   scripts/show/help.sh MAKEFILE KNOB=VALUE...
set -euo pipefail
makefile=$1
shift

sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' "$makefile" | expand -t 20
echo
for knob in "$@"; do
  comment=$(sed -n "/^${knob%%=*} ?=/{x;p;q};h" "$makefile")
  printf '  %-50s %s\n' "$knob" "${comment#\# }"
done
echo
echo "  version $(cat VERSION)"

#!/bin/bash
# List the targets of MAKEFILE and the knobs with their present values.
#
#   scripts/show/help.sh MAKEFILE KNOB=VALUE...
set -euo pipefail
makefile=$1
shift

help() {
  sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1\t\2/p' "$makefile" | expand -t 20
  echo
  for knob in "$@"; do
    comment=$(sed -n "/^${knob%%=*} ?=/{x;p;q};h" "$makefile")
    printf '  %-50s %s\n' "$knob" "${comment#\# }"
  done
  echo
  echo "  version $(cat VERSION)"
}

text=$(help "$@")
trap '' PIPE # whoever stops reading (| head -1) hears no complaint
printf '%s\n' "$text" 2> /dev/null || true

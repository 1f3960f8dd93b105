#!/bin/bash
# List the targets of FILE by theme, or its knobs with their present values.
#
#   scripts/show/help.sh Makefile
#   scripts/show/help.sh knobs.mk KNOB=VALUE...
#
# A heading `# --- Build ---` starts a theme. A target has its help behind ##: `name: …  ## help`.
# A knob's help is the comment above it.
set -euo pipefail
file=$1
shift
declare -A values
for knob in "$@"; do values[${knob%%=*}]=$knob; done

help() {
  local theme='' comment=() line knob more
  while IFS= read -r line; do
    case $line in
      '# --- '*)
        theme=${line#\# --- } theme=${theme%% --*} comment=()
        ;;
      '# '*)
        comment+=("${line#\# }")
        ;;
      *" = \$("*)
        [[ -z $theme ]] || printf '%s\n' "$theme"
        printf '  %s\n' "${values[${line%% = *}]-}"
        for more in "${comment[@]}"; do printf '      %s\n' "$more"; done
        theme='' comment=()
        ;;
      [a-z]*:*'  ## '*)
        [[ -z $theme ]] || printf '%s\n' "$theme"
        printf '  make %-12s %s\n' "${line%%:*}" "${line#*  \#\# }"
        theme='' comment=()
        ;;
      *)
        comment=()
        ;;
    esac
  done < "$file"
  echo
  [[ $# -gt 0 ]] || echo "  make help KNOBS=1 lists the knobs, such as make repository WEIGHTS=synthetic"
  echo "  version $(< VERSION)"
}

text=$(help "$@")
trap '' PIPE # no error message if the reader stops early (| head -1)
printf '%s\n' "$text" 2> /dev/null || true

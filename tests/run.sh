#!/bin/bash
# Format, lint, types and every test; `tests/run.sh -k rebuild` hands options to pytest, ONLY=infer runs tests/infer alone.
# All of them run as two halves at once: much of it waits, for servers and for other programs.
set -euo pipefail
cd "$(dirname "$0")/.."
# Python reads these before tests/starter.py can mend them; a closed standard input would be the first file it opens
unset "${!LC_@}" LANG LANGUAGE GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE PYTHONHOME PYTHONPATH PYTHONUTF8 PYTHONIOENCODING PYTHONOPTIMIZE PYTHONWARNINGS
export LC_ALL=C.UTF-8
[[ -e /dev/fd/0 ]] || exec < /dev/null
export PATH="$PWD/.venv/bin:$PATH"

ruff format --check .
ruff check .
python -m mypy scripts convertation # by its module: a script of a checkout that was moved names its old place
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
if [[ -n ${ONLY-} || $# -gt 0 ]]; then
  exec python -m pytest -ra ${ONLY:+"tests/$ONLY"} "$@"
fi

first=(tests/{house,plans,publish,show,steps}) second=()
for room in tests/*/; do
  [[ " ${first[*]} " == *" ${room%/} "* || $room == */reference/ || $room == */__pycache__/ ]] || second+=("${room%/}")
done
log=$(mktemp) status=0
trap 'rm -f "$log"' EXIT
python -m pytest -ra "${first[@]}" > "$log" 2>&1 &
echo "${first[*]}: run meanwhile, and are shown at the end"
python -m pytest -ra "${second[@]}" || status=$?
wait $! || status=$?
cat "$log"
exit "$status"

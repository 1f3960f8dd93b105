#!/bin/bash
# Format, lint, types and every test; `tests/run.sh -k rebuild` hands options to pytest, ONLY=infer runs tests/infer alone.
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
# More workers than cores: much of it waits, for servers and for other programs
exec python -m pytest -ra --numprocesses $(($(nproc) + 2)) --maxprocesses 6 --dist loadfile --no-loadscope-reorder

#!/bin/bash
# Format, lint, types and every test; `tests/run.sh -k rebuild` hands options to pytest, ONLY=infer runs tests/infer alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

ruff format --check .
ruff check .
mypy scripts convertation
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
python -m pytest -ra ${ONLY:+"tests/$ONLY"} "$@"

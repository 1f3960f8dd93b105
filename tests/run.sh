#!/bin/bash
# Format, lint, types and every test; `tests/run.sh -k rebuild` hands options to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

ruff format --check .
ruff check .
mypy scripts convertation
(cd scripts && mypy --config-file ../pyproject.toml cache.py engine.py explain.py graph.py image.py image_inference.py look.py provenance.py publish.py \
  push.py reload.py report.py stack.py status.py step.py summary.py take.py)
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
python -m pytest -ra "$@"

#!/bin/bash
# Write the lock of each requirements file: requirements.txt gets requirements.lock with the hash of each wheel.
#
#   scripts/steps/lock.sh            run it after each change of a pin; it asks the package index
#
# PyTorch has no hash, because its builds for the CPU and for CUDA come from other indexes.
set -euo pipefail
cd "$(dirname "$0")/../.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools"
"$tools/bin/pip" install -qq --disable-pip-version-check uv==0.13.9
for pins in requirements*.txt tests/requirements.txt; do
  "$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 --no-deps --generate-hashes --no-header --no-annotate \
    --no-emit-package torch --no-emit-index-url --no-emit-find-links --output-file "$tools/lock" "$pins"
  {
    echo "# Made of $pins by scripts/steps/lock.sh; not to be edited"
    cat "$tools/lock"
  } > "${pins%.txt}.lock~"
  mv "${pins%.txt}.lock~" "${pins%.txt}.lock"
  rm "$tools/lock"
  echo "${pins%.txt}.lock"
done

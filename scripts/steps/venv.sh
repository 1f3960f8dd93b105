#!/bin/bash
# Make or update a virtual environment; list its packages in OUT (/dev/null: no list, and its Python is not started).
#
#   scripts/steps/venv.sh PYTHON FOLDER REQUIREMENTS.txt OUT
#
# The pinned packages have wheels for Python 3.11 and 3.12.  If PYTHON is another version, this machine's python3.12 is
# used, or else one that uv, itself from the package index, downloads: https://docs.astral.sh/uv/concepts/python-versions/
#
# If REQUIREMENTS.lock lies beside it (scripts/steps/lock.sh), each wheel must have a hash from there, except PyTorch.
set -euo pipefail
uv=0.13.9 share=~/.local/share/uv
python=$1 folder=$2 requirements=$3 out=$4

exec 9>".make/lock/$folder"
flock 9
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12) ;;
  *)
    echo "$python is Python $version; $folder needs 3.11 or 3.12"
    other=$python python=python3.12 version=3.12
    if ! [[ -x $folder/bin/python3.12 ]] && ! python3.12 -c 'import ensurepip, venv' 2> /dev/null; then
      tool=$(mktemp -d)
      trap 'rm -rf "$tool"' EXIT
      echo "there is no python3.12 here: uv $uv downloads one into its own folder ($share)"
      {
        "$other" -m venv "$tool/venv" &&
          "$tool/venv/bin/python3" -m pip install -qq --disable-pip-version-check "uv==$uv" &&
          "$tool/venv/bin/uv" --quiet venv --managed-python --seed --clear --python 3.12 "$folder"
      } || {
        echo "uv could not make $folder with Python 3.12; install Python 3.11 or 3.12 with its venv, and: make … PYTHON=/path/to/python3.12; or name a mirror of uv's downloads: export UV_PYTHON_INSTALL_MIRROR=https://…" >&2
        exit 1
      }
    fi
    ;;
esac
if ! [[ -x $folder/bin/python$version ]]; then
  "$python" -m venv --clear "$folder" || {
    echo "$python cannot make virtual environments; on Debian and Ubuntu: apt install python$version-venv" >&2
    exit 1
  }
fi
echo "installing $requirements into $folder (the first time this takes minutes)"
install() { "$folder/bin/python$version" -m pip install -qq --disable-pip-version-check "$@"; }
pins() { sed -nE 's/^([A-Za-z0-9._-]+)==([^ ;\\]+).*/\1 \2/p' "$1" | awk '{gsub(/[._]+/, "-", $1); print tolower($1) "==" $2}' | sort; }
lock=${requirements%.txt}.lock
if [[ -e $lock ]]; then
  builds=$(grep -E '^torch==' "$requirements" || true)
  missing=$(comm -23 <(pins "$requirements" | grep -v '^torch==') <(pins "$lock"))
  [[ -z $missing ]] || { echo "$lock lacks ${missing//$'\n'/, } of $requirements; scripts/steps/lock.sh" >&2; exit 1; }
  install --no-deps --require-hashes --requirement "$lock" && { [[ -z $builds ]] || install "$builds"; }
else
  install --requirement "$requirements"
fi || {
  echo "$requirements could not be installed; a mirror of the package index: export PIP_INDEX_URL=https://…" >&2
  exit 1
}
[[ $out == /dev/null ]] || "$folder/bin/python$version" -m pip freeze > "$out"

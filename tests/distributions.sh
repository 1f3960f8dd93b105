#!/bin/bash
# Try the README's two commands on clean systems, each made by mmdebstrap, as a user who is not root; run this as root.
#
#   tests/distributions.sh [SYSTEM...] [-- WORD...]
#
# SYSTEM is bookworm (Debian 12), trixie (Debian 13) or noble (Ubuntu 24.04, needs ubuntu-keyring); without one, all.
# WORDs are added to `make test`, such as ONLY=archives; the word - alone leaves `make test` out.
# Variables: BRING, folders and files of this machine to show there under the same path, read-only (what a pip.conf
# names, say); PYTHON, as `make help` tells; FOLDER, where the systems are made: 10 GB each, removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

systems=()
while (($#)) && [[ $1 != -- ]]; do
  systems+=("$1")
  shift
done
(($# == 0)) || shift
((${#systems[@]})) || systems=(bookworm trixie noble)

# A mount table and processes of our own: whatever happens, nothing stays mounted or runs on
if [[ -z ${OWN_MOUNTS:-} ]]; then
  exec env OWN_MOUNTS=1 unshare --mount --pid --fork --kill-child -- "$0" "${systems[@]}" -- "$@"
fi

try() { # SYSTEM WORD...
  local system=$1 root=$2 mirror keys components=main
  shift 2
  case $system in
    noble) mirror=${UBUNTU_MIRROR:-http://archive.ubuntu.com/ubuntu} keys=/usr/share/keyrings/ubuntu-archive-keyring.gpg
      components=main,universe ;;
    *) mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian} keys=/usr/share/keyrings/debian-archive-keyring.gpg ;;
  esac
  # What the README says to install, and what pip needs besides to trust the index
  mmdebstrap --quiet --variant=apt --components="$components" --keyring="$keys" \
    --include=make,git,python3,python3-venv,ca-certificates "$system" "$root" "$mirror"
  mount -t proc proc "$root/proc"
  mount --rbind /dev "$root/dev"
  mount -t tmpfs -o size=2g tmpfs "$root/dev/shm"
  cp /etc/resolv.conf /etc/hosts "$root/etc/"
  cp -r /etc/ssl/certs/. "$root/etc/ssl/certs/"
  for path in ${BRING:-}; do
    if [[ -d $path ]]; then mkdir -p "$root$path"; else mkdir -p "$root${path%/*}" && touch "$root$path"; fi
    mount --bind -o ro "$path" "$root$path"
  done
  echo 'someone:x:1000:1000::/home/someone:/bin/bash' >> "$root/etc/passwd" # useradd is not everywhere
  echo 'someone:x:1000:' >> "$root/etc/group"
  mkdir "$root/home/someone"
  git clone --quiet --no-hardlinks . "$root/home/someone/project"
  chown -R 1000:1000 "$root/home/someone"
  local as=(chroot --userspec=1000:1000 "$root" env -i HOME=/home/someone USER=someone LANG=C.UTF-8
    PATH=/usr/local/bin:/usr/bin:/bin)
  mapfile -t -O "${#as[@]}" as < <(env | grep -E '^(PIP_|SSL_CERT|REQUESTS_CA|https?_proxy=|no_proxy=|UV_|CI=)' || true)
  local make=(make -C /home/someone/project ${PYTHON:+"PYTHON=$PYTHON"})
  "${as[@]}" "${make[@]}" doctor
  "${as[@]}" "${make[@]}" repository WEIGHTS=synthetic
  [[ ${1:-} == - ]] || "${as[@]}" "${make[@]}" test "$@"
}

for system in "${systems[@]}"; do
  echo "== $system"
  root=$(mktemp -d "${FOLDER:-/var/tmp}/$system.XXXX")
  chmod 755 "$root"
  set +e
  (set -e; try "$system" "$root" "$@")
  status=$?
  set -e
  umount --recursive --lazy "$root"/{proc,dev} 2> /dev/null || true
  for path in ${BRING:-}; do umount "$root$path" 2> /dev/null || true; done
  rm -rf --one-file-system "$root"
  ((status == 0)) || { echo "== $system: the README's commands failed there" >&2; exit 1; }
  echo "== $system: the README's commands work there"
done

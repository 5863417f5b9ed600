#!/usr/bin/env bash
# Makes a base image from the distribution's own archive, for a machine that reaches no container registry: the same release
# and the same packages, another digest. Prints the image's name.
# usage: stand-in.sh bookworm|noble
#
# bookworm stands in for python:3.11-slim-bookworm (Python 3.11 with its headers, which torch.compile includes), noble for the CUDA base on Ubuntu 24.04 (Python 3.12, no CUDA
# file of the base: the wheels carry what torch and vLLM need).
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

release=${1:-}
case "$release" in
    bookworm) packages=ca-certificates,g++,libnuma1,python3,python3-dev,python3-venv,tini ;;
    noble) packages=ca-certificates,g++,python3,python3-dev,python3-venv,tini ;;
    *) die 2 "usage: stand-in.sh bookworm|noble" ;;
esac
# Named after its packages too: another list is another base.
made=$release-$(cksum <<<"$packages" | cut -d' ' -f1)
name=localhost/toolkit-stand-in:$made
# Debian has no keys of Ubuntu's archive; in this package they are, and its hash stands here. (2018 key: F6ECB3762474EDA9...991BC93C)
UBUNTU_KEYS=http://archive.ubuntu.com/ubuntu/pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb
UBUNTU_KEYS_SHA256=36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8
"$REPO/containers/tools.sh" mmdebstrap buildah

archive=$SETUP/stand-in-$made.tar
if [ ! -s "$archive" ]; then
    mkdir -p "$SETUP"
    options=()
    if [ "$release" = noble ]; then
        keyring=/usr/share/keyrings/ubuntu-archive-keyring.gpg
        if [ ! -e "$keyring" ]; then
            keys=$(mktemp -d)
            trap 'rm -rf "$keys"' EXIT
            "$(find_python)" -c 'import sys, urllib.request as u; u.urlretrieve(*sys.argv[1:])' "$UBUNTU_KEYS" "$keys/keys.deb" 2>/dev/null ||
                die 4 "the archive of Ubuntu is not reached" "try again later"
            echo "$UBUNTU_KEYS_SHA256  $keys/keys.deb" | sha256sum --quiet --check >&2 || die 4 "$UBUNTU_KEYS is not what it was"
            dpkg-deb --extract "$keys/keys.deb" "$keys"
            keyring=$keys$keyring
        fi
        options=("--components=main,universe" "--keyring=$keyring")
    fi
    say "making a stand-in base from the archive of $release (once)"
    SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --format=tar --variant=minbase --mode=root --include="$packages" "${options[@]}" \
        "$release" "$archive.part" >&2 ||
        die 4 "mmdebstrap could not make $release" "is the archive of $release reached from here?"
    mv "$archive.part" "$archive"
fi
if ! buildah_ inspect --type image "$name" >/dev/null 2>&1; then
    container=$(buildah_ from scratch)
    buildah_ add --quiet "$container" "$archive" / >/dev/null
    buildah_ config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd /bin/sh "$container"
    buildah_ commit --quiet --timestamp 0 --rm "$container" "$name" >/dev/null
fi
echo "$name"

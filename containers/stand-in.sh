#!/usr/bin/env bash
# Makes a base image from the distribution's own archive, for a machine that can reach no container registry. Release and packages
# are the same as in the pinned base, but the digest differs. Prints the image's name.
# usage: stand-in.sh bookworm|noble
#
#   bookworm   in place of python:3.11-slim-bookworm; has Python 3.11 with its headers, which torch.compile includes
#   noble      in place of the CUDA base on Ubuntu 24.04; has Python 3.12, but no CUDA files, because the wheels contain those
#              that torch and vLLM need
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

release=${1:-}
case "$release" in
    bookworm) packages=ca-certificates,g++,libnuma1,python3,python3-dev,python3-venv,tini ;;
    noble) packages=ca-certificates,g++,python3,python3-dev,python3-venv,tini ;;
    *) die 2 "usage: stand-in.sh bookworm|noble" ;;
esac
# The name contains a checksum of the package list, so that another list makes another base.
made=$release-$(cksum <<<"$packages" | cut -d' ' -f1)
name=localhost/toolkit-stand-in:$made
# Debian does not have the keys of Ubuntu's archive. This package of Ubuntu contains them, and is checked by its hash. (2018 key: F6ECB3762474EDA9...991BC93C)
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
                die 4 "the archive of Ubuntu cannot be reached" "try again later"
            echo "$UBUNTU_KEYS_SHA256  $keys/keys.deb" | sha256sum --quiet --check >&2 || die 4 "the downloaded $UBUNTU_KEYS does not have the expected SHA-256" "try again later, or correct UBUNTU_KEYS_SHA256 in containers/stand-in.sh"
            dpkg-deb --extract "$keys/keys.deb" "$keys"
            keyring=$keys$keyring
        fi
        options=("--components=main,universe" "--keyring=$keyring")
    fi
    say "making a stand-in base from the archive of $release (only once)"
    SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --format=tar --variant=minbase --mode=root --include="$packages" "${options[@]}" \
        "$release" "$archive.part" >&2 ||
        die 4 "mmdebstrap could not make the base of $release" "check that this machine can reach the archive of $release"
    mv "$archive.part" "$archive"
fi
if ! buildah_ inspect --type image "$name" >/dev/null 2>&1; then
    container=$(buildah_ from scratch)
    buildah_ add --quiet "$container" "$archive" / >/dev/null
    buildah_ config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd /bin/sh "$container"
    buildah_ commit --quiet --timestamp 0 --rm "$container" "$name" >/dev/null
fi
echo "$name"

#!/usr/bin/env bash
# Makes a base image from the distribution's own archive, for a machine that reaches no container registry: the same release
# and the same packages, another digest. Prints the image's name.
# usage: stand-in.sh bookworm|noble [--print-name]
#
# bookworm stands in for python:3.11-slim-bookworm (Python 3.11), noble for the CUDA base on Ubuntu 24.04 (Python 3.12, no CUDA
# file of the base: the wheels carry what torch and vLLM need).
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

release=${1:-}
case "$release" in
    bookworm) packages=ca-certificates,g++,python3,python3-venv,tini ;;
    noble) packages=ca-certificates,g++,python3,python3-dev,python3-venv,tini ;;
    *) die 2 "usage: stand-in.sh bookworm|noble" ;;
esac
name=localhost/toolkit-stand-in:$release
"$REPO/containers/tools.sh" mmdebstrap buildah

archive=$SETUP/stand-in-$release.tar
if [ ! -s "$archive" ]; then
    mkdir -p "$SETUP"
    options=()
    [ "$release" = bookworm ] || options=("--components=main,universe")
    say "making a stand-in base from the archive of $release (once)"
    SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --variant=minbase --mode=root --include="$packages" "${options[@]}" \
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

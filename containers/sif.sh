#!/usr/bin/env bash
# Builds a SIF of one target from toolkit.def.
# `cli.py sif` runs this script. Arguments: TARGET SOURCE(image|base) STAND_IN(0|1) OUTPUT(an absolute path, empty: the default)
#
#   image   build from the image of `cli.py build TARGET`; if there is no image, build it first
#   base    build from the base; the %post of the definition installs everything, as on a cluster without a container engine
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

target=$1 source=$2 stand_in=$3
output=${4:-$SETUP/toolkit-$target.sif}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 0755 "$work"
revision=$(git -C "$REPO" rev-parse HEAD 2>/dev/null || echo unknown)

if [ "$source" = image ]; then
    image=localhost/toolkit:$target
    "$REPO/containers/tools.sh" buildah
    buildah_ inspect --type image "$image" >/dev/null 2>&1 ||
        "$REPO/containers/build.sh" "$target" "$stand_in" buildah "$image"
    # The archive is not compressed, because it is read only once, directly after this.
    buildah_ push --quiet --disable-compression "$image" "oci-archive:$work/image.tar" >/dev/null
    arguments=(--build-arg BOOTSTRAP=oci-archive --build-arg "FROM=$work/image.tar")
else
    arguments=(--bind "$work:/mnt")
    "$(find_python)" "$REPO/containers/pip_secrets.py" "$work"
    release=bookworm
    [ "$target" = train ] && release=noble
    if [ "$stand_in" = 1 ]; then
        base=$("$REPO/containers/stand-in.sh" "$release")
        say "NOTE: this build uses the stand-in base $base instead of the pinned base"
        buildah_ push --quiet --disable-compression "$base" "oci-archive:$work/image.tar" >/dev/null
        arguments+=(--build-arg BOOTSTRAP=oci-archive --build-arg "FROM=$work/image.tar" --build-arg APT_SNAPSHOT=)
    elif [ "$release" = bookworm ]; then
        base=$(sed -n 's/^ARG CPU_BASE_IMAGE=//p' "$REPO/containers/Dockerfile" | sed 's/:[^:@/]*@/@/')
        arguments+=(--build-arg "FROM=$base")
    fi
fi

cd "$REPO" # the paths in %files of the definition are relative to this folder
say "building $output ($target, from the $source)"
# The build runs as an ordinary user, as on a cluster, and apptainer maps this user to root inside. (Real root would need every capability.)
# zstd takes a third of the time of gzip, and the file is smaller. Every kernel since 4.14 reads it.
[ "$(id -u)" -ne 0 ] || chown 1000:1000 "$work"
"$REPO/containers/apptainer.sh" build --notest --mksquashfs-args "-comp zstd -Xcompression-level 3" "${arguments[@]}" \
    --build-arg "TARGET=$target" --build-arg "REVISION=$revision" "$work/toolkit.sif" "$REPO/containers/toolkit.def"
mkdir -p "$(dirname "$output")"
chown "$(id -u):$(id -g)" "$work/toolkit.sif"
mv "$work/toolkit.sif" "$output"
say "built $output ($(($(stat -c %s "$output") / 1000000)) MB)"

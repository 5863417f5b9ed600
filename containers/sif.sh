#!/usr/bin/env bash
# Builds a SIF of one target by toolkit.def.
# Run by `cli.py sif`; arguments: TARGET SOURCE(image|base) STAND_IN(0|1) OUTPUT(an absolute path, empty: the default)
#
#   image   from the image that `cli.py build TARGET` made (it is built when it is not there)
#   base    from the base, all of it in the definition's %post, as a cluster without a container engine would
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
    # Uncompressed: it is read once, right away.
    buildah_ push --quiet --disable-compression "$image" "oci-archive:$work/image.tar" >/dev/null
    arguments=(--build-arg BOOTSTRAP=oci-archive --build-arg "FROM=$work/image.tar")
else
    arguments=(--bind "$work:/mnt")
    "$(find_python)" "$REPO/containers/pip_secrets.py" "$work"
    release=bookworm
    [ "$target" = train ] && release=noble
    if [ "$stand_in" = 1 ]; then
        base=$("$REPO/containers/stand-in.sh" "$release")
        say "NOTE: built on a stand-in base, $base, and not on the pinned one"
        buildah_ push --quiet --disable-compression "$base" "oci-archive:$work/image.tar" >/dev/null
        arguments+=(--build-arg BOOTSTRAP=oci-archive --build-arg "FROM=$work/image.tar" --build-arg APT_SNAPSHOT=)
    elif [ "$release" = bookworm ]; then
        base=$(sed -n 's/^ARG CPU_BASE_IMAGE=//p' "$REPO/containers/Dockerfile" | sed 's/:[^:@/]*@/@/')
        arguments+=(--build-arg "FROM=$base")
    fi
fi

cd "$REPO" # %files of the definition are named from here
say "building $output ($target, from the $source)"
# As an ordinary user, as on a cluster: apptainer maps it to root inside. (Real root would need every capability there is.)
# zstd: a third of the time of gzip, and smaller; every kernel since 4.14 reads it.
[ "$(id -u)" -ne 0 ] || chown 1000:1000 "$work"
"$REPO/containers/apptainer.sh" build --notest --mksquashfs-args "-comp zstd -Xcompression-level 3" "${arguments[@]}" \
    --build-arg "TARGET=$target" --build-arg "REVISION=$revision" "$work/toolkit.sif" "$REPO/containers/toolkit.def"
mkdir -p "$(dirname "$output")"
chown "$(id -u):$(id -g)" "$work/toolkit.sif"
mv "$work/toolkit.sif" "$output"
say "built $output ($(($(stat -c %s "$output") / 1000000)) MB)"

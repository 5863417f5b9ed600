#!/usr/bin/env bash
# Builds one image of containers/Dockerfile. A second build gives the same digest.
# `cli.py build` runs this script. Arguments: TARGET STAND_IN(0|1) ENGINE(docker|buildah, empty: choose) TAG
#
#   BASE_IMAGE, CPU_BASE_IMAGE   another base, by digest
#   TOOLKIT_STORE                another folder for buildah's images
#   TOOLKIT_BASE_TIMEOUT         seconds to wait for the registry (default 60)
#
# The pip settings of this machine (index, certificate) are passed to the build as secrets, and no layer contains them. Wheels in
# pip's find-links folders can be used (the CPU build of torch).
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

target=$1 stand_in=$2 engine=$3 tag=$4
case "$target" in
    envcheck) locks=(light.txt) base_variable=CPU_BASE_IMAGE release=bookworm ;;
    train-cpu) locks=(image-torch.txt cpu.txt) base_variable=CPU_BASE_IMAGE release=bookworm ;;
    train) locks=(cu130.txt) base_variable=BASE_IMAGE release=noble ;;
esac

"$REPO/containers/lock.sh" check || exit $?

if [ -z "$engine" ]; then
    if [ "$stand_in" = 0 ] && command -v docker >/dev/null && docker info >/dev/null 2>&1; then
        engine=docker
    else
        engine=buildah
    fi
fi
[ "$engine" = docker ] || "$REPO/containers/tools.sh" buildah skopeo

# ---- the base ----------------------------------------------------------------------------------------------------
base=${!base_variable:-$(sed -n "s/^ARG $base_variable=//p" "$REPO/containers/Dockerfile")}
snapshot=()
if [ "$stand_in" = 1 ]; then
    [ "$engine" = buildah ] || die 2 "--stand-in needs buildah"
    base=$("$REPO/containers/stand-in.sh" "$release")
    snapshot=(--build-arg APT_SNAPSHOT=)
    say "NOTE: this build uses the stand-in base $base instead of the pinned base: release and packages are the same, the digest differs"
elif [[ $base != localhost/* && $base != *@sha256:* ]]; then
    die 1 "$base_variable=$base is not pinned by digest" "append @sha256:... to the name (skopeo inspect docker://$base prints the digest)"
elif [ "$engine" = buildah ] && ! buildah_ inspect --type image "$base" >/dev/null 2>&1; then
    # The registry is queried here, so that a wrong digest and an unreachable registry give different errors.
    [[ $base != localhost/* ]] || die 1 "$base_variable=$base is not in the local store" "build or load this image first, or name another image"
    reference=$(sed 's/:[^:@/]*@/@/' <<<"$base") # skopeo does not read a name with both tag and digest
    answer=$(timeout "${TOOLKIT_BASE_TIMEOUT:-60}" skopeo inspect --raw "docker://$reference" 2>&1 >/dev/null) || {
        case "$answer" in
            *"manifest unknown"* | *"does not match"* | *"not found"* | *"invalid reference"* | *"invalid checksum"*)
                die 1 "$base_variable: the registry has no image $base" "correct the digest: skopeo inspect docker://${base%@*} prints the current one"
                ;;
            *) die 4 "the registry of $base cannot be reached" "try again, or build on a stand-in base with --stand-in" ;;
        esac
    }
fi

# ---- pip's settings, as secrets --------------------------------------------------------------------------------
private=$(mktemp -d)
trap 'rm -rf "$private"' EXIT
"$(find_python)" "$REPO/containers/pip_secrets.py" "$private"

# ---- build -------------------------------------------------------------------------------------------------------
created=$(git -C "$REPO" log -1 --format=%cI 2>/dev/null || echo unknown)
revision=$(git -C "$REPO" rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git -C "$REPO" status --porcelain -- toolkit schemas locks containers pyproject.toml 2>/dev/null)" ] || revision=$revision-dirty
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$REPO/toolkit/base/version.py")
arguments=(
    --build-arg "$base_variable=$base" "${snapshot[@]}"
    --build-arg "SOURCE_DATE_EPOCH=$EPOCH" --build-arg "CREATED=$created" --build-arg "REVISION=$revision" --build-arg "VERSION=$version"
    --build-arg "LOCK_DIGEST=$(lock_digest "${locks[@]}")" --build-arg "BASE_NAME=$base"
    --secret "id=pipconf,src=$private/pip.conf" --secret "id=ca,src=$private/ca.crt"
    --build-context "wheels=$private/wheels"
)
say "building $tag ($engine, base $base)"
cd "$REPO"
if [ "$engine" = docker ]; then
    SOURCE_DATE_EPOCH=$EPOCH docker buildx build --file containers/Dockerfile --target "$target" "${arguments[@]}" \
        --output "type=docker,name=$tag,rewrite-timestamp=true" .
    digest=$(docker image inspect --format '{{.Id}}' "$tag")
    size=$(docker image inspect --format '{{.Size}}' "$tag")
else
    # chroot isolation works in a container and without a user namespace. Only the docker format can store the HEALTHCHECK, and all
    # engines read it. fixed_config.py removes the builder's random names from the image's configuration. So the image gets its
    # tag only after that.
    buildah_ bud --isolation chroot --network host --timestamp "$EPOCH" --layers --format docker --identity-label=false \
        --ignorefile containers/Dockerfile.dockerignore --file containers/Dockerfile --target "$target" \
        "${arguments[@]}" --iidfile "$private/id" . >"$private/log" 2>&1 || {
        tail -n 40 "$private/log" >&2
        die "$(grep -q 'the lock does not match' "$private/log" && echo 1 || echo 4)" "the build of $target failed"
    }
    buildah_ inspect --type image "$(cat "$private/id")" >"$private/inspected.json"
    size=$("$(find_python)" "$REPO/containers/fixed_config.py" "$private/inspected.json" "$private/fixed")
    skopeo copy --quiet --insecure-policy "dir:$private/fixed" "containers-storage:$(store_of_images)$tag"
    digest=$(buildah_ inspect --type image --format '{{.FromImageDigest}}' "$tag")
fi
say "built $tag $digest ($((size / 1000000)) MB, with its base)"

# shellcheck shell=bash
# What the scripts of this folder share. Sourced, never run.
# Exit codes are the product's own: 1 the request must change, 2 usage, 3 this machine lacks something, 4 try again later.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # used by those that source this
SETUP=${TOOLKIT_SETUP:-$REPO/.setup/containers} # what the scripts fetch or make: ignored by git, safe to delete

say() { echo "${0##*/}: $*" >&2; }

die() { # CODE MESSAGE [FIX]
    say "error: $2"
    [ -z "${3:-}" ] || say "  fix: $3"
    exit "$1"
}

find_uv() { # Prints a uv; the project's own virtual environment first, so that everybody locks with one version.
    local candidate
    for candidate in "$REPO/.venv/bin/uv" "$(command -v uv || true)"; do
        if [ -x "$candidate" ]; then
            echo "$candidate"
            return
        fi
    done
    die 3 "uv is not installed" "run \`just setup\`"
}

find_python() { # Prints a Python for the helper scripts: the project's own if it is there.
    if [ -x "$REPO/.venv/bin/python" ]; then echo "$REPO/.venv/bin/python"; else command -v python3; fi
}

# The moment that every layer claims. Fixed, and not the commit's: a layer taken from the cache then has the bytes of one
# built anew, and a change of the product moves the product's layer alone. (Not 0: a zip file cannot hold dates before 1980.)
# shellcheck disable=SC2034
EPOCH=${SOURCE_DATE_EPOCH:-1767225600}

lock_digest() { # LOCK...: as image_manifest.py computes it
    local name
    for name in "$@"; do cat "$REPO/locks/$name"; done | sha256sum | sed 's/^\([0-9a-f]*\).*/sha256:\1/'
}

# Where images are kept: the user's own store, or TOOLKIT_STORE (the tests use one that they can throw away).
STORE_OPTIONS=()
if [ -n "${TOOLKIT_STORE:-}" ]; then
    STORE_OPTIONS=(--root "$TOOLKIT_STORE/root" --runroot "$TOOLKIT_STORE/run")
fi

buildah_() { buildah "${STORE_OPTIONS[@]}" "$@"; }

store_of_images() { # The same store, as skopeo names it.
    buildah_ info --format '[{{.store.GraphDriverName}}@{{.store.GraphRoot}}+{{.store.RunRoot}}]'
}

# crun fails where /proc is partly hidden; podman's default limits need CAP_SYS_RESOURCE.
podman_() { podman "${STORE_OPTIONS[@]}" --cgroup-manager=cgroupfs --runtime "${TOOLKIT_RUNTIME:-runc}" "$@"; }

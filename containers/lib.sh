# shellcheck shell=bash
# Functions and variables that the scripts of this folder share. They source this file; it is never run.
# Exit codes are those of the toolkit: 1 the request must be changed, 2 wrong usage, 3 this machine lacks something, 4 try again later.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # used by those that source this
SETUP=${TOOLKIT_SETUP:-$REPO/.setup/containers} # downloads and results of the scripts; git ignores the folder, and it can be deleted

say() { echo "${0##*/}: $*" >&2; }

die() { # CODE MESSAGE [FIX]
    say "error: $2"
    [ -z "${3:-}" ] || say "  fix: $3"
    exit "$1"
}

find_uv() { # Prints the path of uv. The project's own virtual environment is first, so that everybody locks with the same version.
    local candidate
    for candidate in "$REPO/.venv/bin/uv" "$(command -v uv || true)"; do
        if [ -x "$candidate" ]; then
            echo "$candidate"
            return
        fi
    done
    die 3 "uv is not installed" "run \`just setup\`"
}

find_python() { # Prints the path of a Python for the helper scripts: that of the project's virtual environment, if there is one.
    if [ -x "$REPO/.venv/bin/python" ]; then echo "$REPO/.venv/bin/python"; else command -v python3; fi
}

# The time stamp of every layer. It is fixed and not that of the commit, so that a layer from the cache and a new one have the same
# bytes, and a change of the product changes only the product's layer. (It is not 0, because zip files have no dates before 1980.)
# shellcheck disable=SC2034
EPOCH=${SOURCE_DATE_EPOCH:-1767225600}

lock_digest() { # LOCK...: prints the digest of the locks; image_manifest.py computes the same one
    local name
    for name in "$@"; do cat "$REPO/locks/$name"; done | sha256sum | sed 's/^\([0-9a-f]*\).*/sha256:\1/'
}

# Where images are stored: in the user's own store, or in TOOLKIT_STORE (the tests use a temporary one).
STORE_OPTIONS=()
if [ -n "${TOOLKIT_STORE:-}" ]; then
    STORE_OPTIONS=(--root "$TOOLKIT_STORE/root" --runroot "$TOOLKIT_STORE/run")
fi

buildah_() { buildah "${STORE_OPTIONS[@]}" "$@"; }

store_of_images() { # Prints the name of the same store in skopeo's syntax.
    buildah_ info --format '[{{.store.GraphDriverName}}@{{.store.GraphRoot}}+{{.store.RunRoot}}]'
}

# runc is used because crun fails where /proc is partly hidden. The default limits of podman need CAP_SYS_RESOURCE.
podman_() { podman "${STORE_OPTIONS[@]}" --cgroup-manager=cgroupfs --runtime "${TOOLKIT_RUNTIME:-runc}" "$@"; }

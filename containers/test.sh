#!/usr/bin/env bash
# Builds the real images and the real SIF and runs them: as four users, read-only, without network or capabilities.
# usage: test.sh [--quick] [PYTEST-ARGUMENTS...]      --quick: the envcheck image alone, about two minutes
#
# Where the registry of the pinned bases is not reached, stand-in bases are made, and the output says so.
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

select=image
if [ "${1:-}" = --quick ]; then
    select="image and not slow"
    shift
fi
"$REPO/containers/tools.sh" buildah podman skopeo runc mmdebstrap catatonit
cd "$REPO"
exec "$(find_python)" -m pytest -m "$select" tests/image -v "$@"

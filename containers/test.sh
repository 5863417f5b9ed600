#!/usr/bin/env bash
# Builds the real images and the real SIF and runs them: as four users, read-only, without network or capabilities.
# Run by `cli.py test`; arguments: MARKS(of pytest) PYTEST-ARGUMENTS...
#
# Where the registry of the pinned bases is not reached, stand-in bases are made, and the output says so.
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

marks=$1
shift
"$REPO/containers/tools.sh" buildah podman skopeo runc mmdebstrap catatonit
cd "$REPO"
exec "$(find_python)" -m pytest -m "$marks" tests/image -v "$@"

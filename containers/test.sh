#!/usr/bin/env bash
# Builds the real images and the real SIF, and runs them as four users, read-only, without network or capabilities.
# `cli.py test` runs this script. Arguments: MARKS(of pytest) PYTEST-ARGUMENTS...
#
# If the registry of the pinned bases cannot be reached, the images are built on stand-in bases, and the output reports this.
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

marks=$1
shift
"$REPO/containers/tools.sh" buildah podman skopeo runc mmdebstrap catatonit
cd "$REPO"
exec "$(find_python)" -m pytest -m "$marks" tests/image -v "$@"

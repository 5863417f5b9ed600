#!/usr/bin/env bash
# Makes sure that the named programs are installed. Root installs missing Debian packages; for other users, missing packages are an error.
# usage: tools.sh PROGRAM...      PROGRAM: buildah podman skopeo umoci runc mmdebstrap mksquashfs unsquashfs bwrap
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

package_of() {
    case "$1" in
        mksquashfs | unsquashfs) echo squashfs-tools ;;
        bwrap) echo bubblewrap ;;
        *) echo "$1" ;;
    esac
}

packages=()
for program in "$@"; do
    command -v "$program" >/dev/null || packages+=("$(package_of "$program")")
done
[ "${#packages[@]}" -gt 0 ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    die 3 "these packages are not installed: ${packages[*]}" "install them (as root on Debian or Ubuntu: apt-get install ${packages[*]})"
fi
say "installing ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
lock=(-o DPkg::Lock::Timeout=300)
apt-get "${lock[@]}" -qq update >/dev/null
apt-get "${lock[@]}" -qq install -y --no-install-recommends "${packages[@]}" >/dev/null ||
    die 3 "apt-get could not install ${packages[*]}"

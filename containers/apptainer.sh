#!/usr/bin/env bash
# Runs apptainer or singularity. If this machine has neither, Debian's apptainer is installed into a folder of its own and run.
# usage: apptainer.sh ARGUMENTS...
#
#   TOOLKIT_APPTAINER=debian     use Debian's apptainer even if this machine has one
#   TOOLKIT_APPTAINER_USER=UID   the ordinary user to run it as, if the caller is root (default 1000; 0: remain root)
#   TOOLKIT_APPTAINER_BIND=DIR   one more folder that the program can read (it can always read the repository and /tmp)
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

for program in apptainer singularity; do
    if command -v "$program" >/dev/null && [ "${TOOLKIT_APPTAINER:-}" != debian ]; then
        exec "$program" "$@"
    fi
done

[ "$(id -u)" -eq 0 ] || die 3 "apptainer is not installed on this machine" "install apptainer, or run this script as root on Debian"
root=$SETUP/apptainer-root
if [ ! -e "$root/usr/bin/apptainer" ]; then
    "$REPO/containers/tools.sh" mmdebstrap
    say "downloading apptainer from Debian (only once)"
    rm -rf "$root"
    mkdir -p "$SETUP"
    SOURCE_DATE_EPOCH=0 mmdebstrap --quiet --variant=apt --mode=root --include=apptainer,mount,squashfuse \
        --aptopt='Acquire::Check-Valid-Until "false"' sid "$root" >&2 ||
        die 4 "mmdebstrap could not fetch apptainer" "check that this machine can reach Debian's archive"
    echo 'builder:x:1000:1000:builder:/home/builder:/bin/sh' >>"$root/etc/passwd"
    echo 'builder:x:1000:' >>"$root/etc/group"
    install -d -o 1000 -g 1000 "$root/home/builder"
fi

# pivot_root is used instead of chroot, because apptainer makes its own mount namespace, which the kernel refuses inside a chroot.
export root REPO USER_ID="${TOOLKIT_APPTAINER_USER:-1000}" EXTRA="${TOOLKIT_APPTAINER_BIND:-}" FROM_DIR=$PWD
# shellcheck disable=SC2016 # expanded by the inner shell
exec unshare --mount --propagation private bash -euc '
    mount --bind "$root" "$root"
    mount --rbind /proc "$root/proc"
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    # On a normal machine, ordinary users may open /dev/fuse. Each call makes its own device node, because several calls may start at once.
    mknod -m 0666 "$root/run/fuse-$$" c 10 229
    mount --bind "$root/run/fuse-$$" "$root/dev/fuse"
    rm "$root/run/fuse-$$"
    for file in /etc/resolv.conf /etc/hosts /etc/localtime; do
        # Apptainer reads and binds these files. Each may be a link, on this machine and in the folder of Debian.
        if [ -e "$file" ]; then
            [ ! -L "$root$file" ] || rm -f "$root$file"
            touch "$root$file"
            mount --bind "$(readlink -f "$file")" "$root$file"
        fi
    done
    for folder in "$REPO" /tmp ${EXTRA:+"$EXTRA"}; do
        mkdir -p "$root$folder"
        mount --rbind "$folder" "$root$folder"
    done
    mkdir -p "$root/.old"
    cd "$root"
    pivot_root . .old
    umount -l /.old
    cd "$FROM_DIR" 2>/dev/null || cd /tmp
    if [ "$USER_ID" = 0 ]; then
        export HOME=/root USER=root
        exec /usr/bin/apptainer "$@"
    fi
    export HOME=/home/builder USER=builder LOGNAME=builder
    exec setpriv --reuid "$USER_ID" --regid "$USER_ID" --clear-groups -- /usr/bin/apptainer "$@"
' apptainer.sh "$@"

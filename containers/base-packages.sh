#!/bin/sh
# Installs the named distribution packages that the base lacks, and leaves no trace of having done so.
# usage: base-packages.sh PACKAGE...
#
# APT_SNAPSHOT=YYYYMMDDTHHMMSSZ takes the archive as it was at that moment, so that a later build gives the same
# bytes; an empty value takes today's (then only builds of the same day agree).
set -eu

missing=""
for package in "$@"; do
    # A base may bring Python by another way than its package manager (python:3.11-slim does).
    case "$package" in
        python3 | python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null && continue ;;
    esac
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done

if [ -n "$missing" ]; then
    # shellcheck source=/dev/null
    . /etc/os-release
    # Sandbox::User: in a user namespace of one user (Apptainer's) there is no _apt to become.
    set -- -o Acquire::Check-Valid-Until=false -o Acquire::Languages=none -o APT::Sandbox::User=root
    if [ -s /run/secrets/ca ]; then
        set -- "$@" -o Acquire::https::CAInfo=/run/secrets/ca
    fi
    if [ -n "${APT_SNAPSHOT:-}" ]; then
        # A list of our own, outside /etc, so that the image's own stays as the base has it.
        list=/tmp/snapshot.list
        case "$ID" in
            debian)
                key=/usr/share/keyrings/debian-archive-keyring.gpg
                site=http://snapshot.debian.org/archive
                {
                    echo "deb [signed-by=$key] $site/debian/$APT_SNAPSHOT $VERSION_CODENAME main"
                    echo "deb [signed-by=$key] $site/debian-security/$APT_SNAPSHOT $VERSION_CODENAME-security main"
                } >"$list"
                ;;
            ubuntu)
                key=/usr/share/keyrings/ubuntu-archive-keyring.gpg
                site=http://snapshot.ubuntu.com/ubuntu
                for pocket in "" -updates -security; do
                    echo "deb [signed-by=$key] $site/$APT_SNAPSHOT $VERSION_CODENAME$pocket main universe"
                done >"$list"
                ;;
            *)
                echo "base-packages: no archive snapshots known for $ID: build with --build-arg APT_SNAPSHOT=" >&2
                exit 1
                ;;
        esac
        set -- "$@" -o Dir::Etc::SourceList="$list" -o Dir::Etc::SourceParts=/dev/null
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get "$@" update
    # shellcheck disable=SC2086 # a list of names
    apt-get "$@" install -y --no-install-recommends $missing
fi

# The forward-compatibility libraries break newer drivers when a hook or a stray path picks them up: they wait where
# nothing looks, and the entry point brings them in when asked (TOOLKIT_CUDA_COMPAT=1) and the driver needs them.
for compat in /usr/local/cuda-*/compat; do
    if [ -d "$compat" ] && [ ! -L "$compat" ]; then
        rm -rf /opt/cuda-compat
        mv "$compat" /opt/cuda-compat
    fi
done

# Logs and caches differ from build to build.
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache \
    /var/lib/dpkg/*-old /var/log/apt /var/log/alternatives.log /var/log/dpkg.log /var/log/bootstrap.log /tmp/snapshot.list

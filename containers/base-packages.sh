#!/bin/sh
# Installs those of the named distribution packages that the base does not have, and removes all logs and caches of the installation.
# usage: base-packages.sh PACKAGE...
#
# APT_SNAPSHOT=YYYYMMDDTHHMMSSZ uses the distribution's archive of that time, so that a later build gives the same
# bytes. An empty value uses the current archive; then only builds of the same day are equal.
set -eu

missing=""
for package in "$@"; do
    # A base may have a Python that its package manager did not install (python:3.11-slim).
    case "$package" in
        python3 | python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null && continue ;;
    esac
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done

if [ -n "$missing" ]; then
    # shellcheck source=/dev/null
    . /etc/os-release
    # Sandbox::User: a user namespace with one user (Apptainer's) has no user _apt.
    set -- -o Acquire::Check-Valid-Until=false -o Acquire::Languages=none -o APT::Sandbox::User=root
    if [ -s /run/secrets/ca ]; then
        set -- "$@" -o Acquire::https::CAInfo=/run/secrets/ca
    fi
    if [ -n "${APT_SNAPSHOT:-}" ]; then
        # A separate package list, outside /etc, so that the list of the base does not change.
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
                echo "base-packages: no archive snapshots are known for the distribution $ID: build with an empty APT_SNAPSHOT (--build-arg APT_SNAPSHOT=)" >&2
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

# If a hook or a search path finds the forward-compatibility libraries, they break newer drivers. So they are moved to a folder
# that no program searches. The entry point uses them if TOOLKIT_CUDA_COMPAT=1 is set and the driver needs them.
for compat in /usr/local/cuda-*/compat; do
    if [ -d "$compat" ] && [ ! -L "$compat" ]; then
        rm -rf /opt/cuda-compat
        mv "$compat" /opt/cuda-compat
    fi
done

# Logs and caches are removed, because they differ between builds.
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/aux-cache \
    /var/lib/dpkg/*-old /var/log/apt /var/log/alternatives.log /var/log/dpkg.log /var/log/bootstrap.log /tmp/snapshot.list

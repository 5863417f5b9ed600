#!/bin/sh
# pip inside an image build, for environment.sh and product.sh. Sourced.
#
# pip itself lives in a folder of its own and goes when the step ends: the image ships without it.

PIP_HOME=/tmp/pip
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
# Byte code that depends on neither the clock nor the hash seed.
export PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-1767225600}"
# This machine's settings, if the build was given any, as secrets.
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca
fi
if [ -s /run/secrets/pipconf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pipconf
fi

pip_here() { # ARGUMENTS...: pip, working on its own environment
    "$PIP_HOME/bin/python" -m pip "$@"
}

pip_into() { # ARGUMENTS...: pip, working on the image's environment
    "$PIP_HOME/bin/python" -m pip --python /opt/toolkit/bin/python "$@"
}

compile() { # FOLDER: byte code beside each module; the image's file system is read-only, so nobody can write it later
    # Files that hold another Python's syntax on purpose (templates, tests) do not compile: that is no error of ours.
    /opt/toolkit/bin/python -m compileall -q -j 1 --invalidation-mode unchecked-hash "$1" >/tmp/compile.log 2>&1 || true
    rm -f /tmp/compile.log
}

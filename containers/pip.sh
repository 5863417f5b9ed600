#!/bin/sh
# Functions that run pip inside an image build. environment.sh and product.sh source this file.
#
# pip is installed into its own folder, which is removed at the end of the build step. So the image does not contain pip.

PIP_HOME=/tmp/pip
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
# With these settings, byte code does not depend on the clock or the hash seed.
export PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-1767225600}"
# The pip settings of the build machine, if the build was given any. They are secrets.
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca
fi
if [ -s /run/secrets/pipconf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pipconf
fi

pip_here() { # ARGUMENTS...: run pip on its own environment
    "$PIP_HOME/bin/python" -m pip "$@"
}

pip_into() { # ARGUMENTS...: run pip on the environment of the image
    "$PIP_HOME/bin/python" -m pip --python /opt/toolkit/bin/python "$@"
}

compile() { # FOLDER: write byte code beside each module, because the image's file system may be read-only later
    # Some files (templates, tests) have the syntax of another Python on purpose and do not compile. This is not an error.
    /opt/toolkit/bin/python -m compileall -q -j 1 --invalidation-mode unchecked-hash "$1" >/tmp/compile.log 2>&1 || true
    rm -f /tmp/compile.log
}

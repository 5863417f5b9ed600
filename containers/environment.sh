#!/bin/sh
# Makes the virtual environment /opt/toolkit inside an image build, from locks. Every wheel is checked by its hash.
# usage: environment.sh LOCK...      the locks must be in the folder of this script
set -eu
here=$(dirname "$0")
# shellcheck source=containers/pip.sh
. "$here/pip.sh"

python3 -m venv --without-pip /opt/toolkit
python3 -m venv "$PIP_HOME"
for lock in "$@"; do
    # The CPU build of torch is not on the public index. It is installed from the folder of wheels, or else from torch's own index.
    source_of_wheels=""
    if [ "$lock" = image-torch ]; then
        source_of_wheels="--index-url=${TORCH_INDEX:?}"
        for wheel in /run/wheels/torch-*+cpu-*.whl /mnt/wheels/torch-*+cpu-*.whl; do
            [ -e "$wheel" ] && source_of_wheels="--no-index --find-links=${wheel%/*}"
        done
    fi
    # shellcheck disable=SC2086 # one or two options
    pip_into install --quiet --no-compile --no-deps --only-binary :all: --require-hashes $source_of_wheels \
        -r "$here/$lock.txt"
done
# direct_url.json names the source of a wheel, which may differ between builds. No program reads this file at run time.
find /opt/toolkit -name direct_url.json -delete
compile /opt/toolkit/lib
rm -rf "$PIP_HOME"

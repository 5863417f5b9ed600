#!/bin/sh
# The two steps of an image build that need pip.
# usage: install.sh environment LOCK...    makes /opt/toolkit from locks/LOCK.txt, every wheel checked by its hash
#        install.sh product TARGET         makes /out: the product's own files, laid out as in the final image
#
# pip itself lives in a folder of its own: the image ships without it.
set -eu

PIP_HOME=/tmp/pip
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1
# Byte code that depends on neither the clock nor the hash seed.
export PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}"
if [ -s /run/secrets/ca ]; then
    export PIP_CERT=/run/secrets/ca
fi
if [ -s /run/secrets/pipconf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pipconf
fi

pip_into() { # ARGUMENTS...: pip, working on /opt/toolkit
    "$PIP_HOME/bin/python" -m pip --python /opt/toolkit/bin/python "$@"
}

compile() { # FOLDER: byte code beside each module; the image's file system is read-only, so nobody can write it later
    # Files that hold another Python's syntax on purpose (templates, tests) do not compile: that is no error of ours.
    /opt/toolkit/bin/python -m compileall -q -j 1 --invalidation-mode unchecked-hash "$1" >/tmp/compile.log 2>&1 || true
    rm -f /tmp/compile.log
}

environment() {
    python3 -m venv --without-pip /opt/toolkit
    python3 -m venv "$PIP_HOME"
    for lock in "$@"; do
        # The CPU build of torch is not on the public index: from the wheels folder if it is there, else from its own.
        source_of_wheels=""
        if [ "$lock" = image-torch ]; then
            source_of_wheels="--index-url=${TORCH_INDEX:?}"
            for wheel in /mnt/torch-*+cpu-*.whl /mnt/wheels/torch-*+cpu-*.whl; do
                [ -e "$wheel" ] && source_of_wheels="--no-index --find-links=${wheel%/*}"
            done
        fi
        # shellcheck disable=SC2086 # one or two options
        pip_into install --quiet --no-compile --no-deps --only-binary :all: --require-hashes $source_of_wheels \
            -r "/usr/share/toolkit/$lock.txt"
    done
    # Two files name the build's own moment or commands; none is read by anything at run time.
    find /opt/toolkit -name direct_url.json -delete
    compile /opt/toolkit/lib
    rm -rf "$PIP_HOME"
}

product() {
    target=$1
    cd /build/src
    python3 -m venv "$PIP_HOME"
    "$PIP_HOME/bin/python" -m pip install --quiet --no-compile --no-deps --require-hashes -r locks/build.txt
    "$PIP_HOME/bin/python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /build/dist .
    pip_into install --quiet --no-compile --no-deps --no-index --root /out /build/dist/*.whl
    find /out -name direct_url.json -delete
    compile /out/opt/toolkit/lib

    install -D -m 0755 containers/entrypoint.sh /out/usr/local/bin/toolkit-entrypoint
    install -D -m 0755 containers/healthcheck.sh /out/usr/local/bin/toolkit-health
    # Anyone may work here, whatever their uid: sticky, as /tmp.
    install -d -m 1777 /out/work
    install -d -m 1777 /out/cache
    # A name for the default user, by a line and not by useradd, which leaves dates and backups.
    install -d -m 0755 /out/etc /out/usr/share/toolkit
    cp /etc/passwd /etc/group /out/etc/
    echo 'toolkit:x:1000:1000:toolkit:/cache:/bin/sh' >>/out/etc/passwd
    echo 'toolkit:x:1000:' >>/out/etc/group

    # Last, since it judges what lies there: the lock against what pyproject.toml asks for.
    PYTHONPATH="/out$(/opt/toolkit/bin/python -c 'import site; print(site.getsitepackages()[0])')" \
        /opt/toolkit/bin/python containers/image_manifest.py --target "$target" --revision "${REVISION:-unknown}" \
        --base "${BASE_NAME:-unknown}" --source-date-epoch "$SOURCE_DATE_EPOCH" --locks locks \
        --output /out/usr/share/toolkit/image.json
}

step=${1:?environment or product}
shift
case "$step" in
    environment) environment "$@" ;;
    product) product "$@" ;;
    *)
        echo "install: environment or product, not $step" >&2
        exit 2
        ;;
esac

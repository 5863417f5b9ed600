#!/bin/sh
# Makes /out inside an image build: the product's own files, with the folders of the final image.
# usage: product.sh TARGET      reads the sources in /build/src
set -eu
target=$1
cd /build/src
# shellcheck source=containers/pip.sh
. containers/pip.sh

python3 -m venv "$PIP_HOME"
pip_here install --quiet --no-compile --no-deps --require-hashes -r locks/build.txt
pip_here wheel --quiet --no-deps --no-build-isolation --wheel-dir /build/dist .
pip_into install --quiet --no-compile --no-deps --no-index --no-warn-script-location --root /out /build/dist/*.whl
find /out -name direct_url.json -delete
compile /out/opt/toolkit/lib

install -D -m 0755 containers/entrypoint.sh /out/usr/local/bin/toolkit-entrypoint
install -D -m 0755 containers/healthcheck.sh /out/usr/local/bin/toolkit-health
# Users with any uid may write here. The folders have the sticky bit, like /tmp.
install -d -m 1777 /out/work /out/cache
# The name of the default user. It is added as a line, because useradd writes dates and backup files.
install -d -m 0755 /out/etc /out/usr/share/toolkit
cp /etc/passwd /etc/group /out/etc/
echo 'toolkit:x:1000:1000:toolkit:/cache:/bin/sh' >>/out/etc/passwd
echo 'toolkit:x:1000:' >>/out/etc/group

# This step is last, because it checks the installed packages and the lock against the requirements of pyproject.toml.
site=$(/opt/toolkit/bin/python -c 'import site; print(site.getsitepackages()[0])')
PYTHONPATH="/out$site" /opt/toolkit/bin/python containers/image_manifest.py --target "$target" --locks locks \
    --revision "${REVISION:-unknown}" --base "${BASE_NAME:-unknown}" --source-date-epoch "$SOURCE_DATE_EPOCH" \
    --output /out/usr/share/toolkit/image.json
rm -rf "$PIP_HOME"

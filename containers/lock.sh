#!/usr/bin/env bash
# Refreshes uv.lock and locks/*.txt from pyproject.toml. The locks name only the public index.
# `cli.py lock` runs this script. Arguments: MODE
#
#   lock     lock again; use newer releases only if pyproject.toml requires them
#   upgrade  lock the newest releases that pyproject.toml allows
#   check    change nothing; end with 1 if a file differs from what pyproject.toml and uv.lock generate
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

# The version of torch's CPU build for Python 3.11, and the SHA-256 of its file. This build is not on the public index.
TORCH_CPU_VERSION=2.13.0
TORCH_CPU_SHA256=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b

mode=$1
uv=$(find_uv)
cd "$REPO"

# The index settings of this machine must not be in a lock. UV_NO_CONFIG is not set, because uv would then ignore [tool.uv] of pyproject.toml too.
export XDG_CONFIG_DIRS=/nonexistent XDG_CONFIG_HOME=/nonexistent
unset UV_INDEX UV_DEFAULT_INDEX UV_INDEX_URL UV_EXTRA_INDEX_URL UV_FIND_LINKS UV_CONSTRAINT UV_OVERRIDE UV_NO_CONFIG

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT

export_lock() { # FILE OPTIONS...
    local file=$1
    shift
    "$uv" export --quiet --frozen --format requirements.txt --no-emit-project --no-header "$@" -o "$fresh/$file" >/dev/null
}

if [ "$mode" = check ]; then
    "$uv" lock --quiet --check ||
        die 1 "uv.lock does not match pyproject.toml" "run \`just lock\`, check the changes, and commit them"
else
    upgrade=()
    [ "$mode" = lock ] || upgrade=(--upgrade)
    "$uv" lock --quiet "${upgrade[@]}"
fi
export_lock light.txt
export_lock dev.txt --extra dev
export_lock cu130.txt --extra cuda
export_lock cpu.txt --extra cpu-engine --no-emit-package torch --no-emit-package intel-cmplr-lib-ur
if [ "$mode" = check ]; then
    cp locks/build.txt "$fresh/build.txt"
else
    # build.txt has the build backend of pyproject.toml, with hashes. It builds the wheel in an image.
    sed -n 's/^requires = \["\(hatchling==[0-9.]*\)"\]$/\1/p' pyproject.toml |
        "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
            - -o "$fresh/build.txt" >/dev/null
fi
cat >"$fresh/image-torch.txt" <<END
# The CPU build of torch for Python 3.11 (not on the public index); pip checks the file by this hash, wherever it finds it.
torch==$TORCH_CPU_VERSION+cpu \\
    --hash=sha256:$TORCH_CPU_SHA256
END

grep -q "^cpu-engine = .*\"torch==$TORCH_CPU_VERSION\"" pyproject.toml ||
    die 1 "the extra cpu-engine of pyproject.toml does not require torch==$TORCH_CPU_VERSION" \
        "set TORCH_CPU_VERSION and TORCH_CPU_SHA256 in containers/lock.sh to the version that pyproject.toml requires"
grep -q "^hatchling==" "$fresh/build.txt" ||
    die 1 "locks/build.txt does not contain hatchling" "require one exact version of hatchling in [build-system] of pyproject.toml"

# A lock may name only the public index. The host of a private mirror would be published, and other people cannot reach it.
others=$(grep -hoE '(https?|file|ftp)://[^/" ]*' uv.lock "$fresh"/*.txt | sort -u |
    grep -vxE 'https://(pypi\.org|files\.pythonhosted\.org)' || true)
[ -z "$others" ] || die 1 "the locks name other hosts than the public index: ${others//$'\n'/ }" \
    "unset the index settings of this machine and run \`just lock\`"
if grep -lE '^(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)' "$fresh"/*.txt; then
    die 1 "the lock above contains index options" "unset the index settings of this machine and run \`just lock\`"
fi

for file in light dev cu130 cpu build image-torch; do
    if [ "$mode" = check ]; then
        cmp -s "$fresh/$file.txt" "locks/$file.txt" || {
            diff "locks/$file.txt" "$fresh/$file.txt" | head -n 5 >&2 || true
            die 1 "locks/$file.txt differs from what uv.lock generates" "run \`just lock\`, check the changes, and commit them"
        }
    else
        cp "$fresh/$file.txt" "locks/$file.txt"
    fi
done
say "the locks match pyproject.toml: $(grep -hcE '^[a-z0-9.-]+==' locks/cu130.txt) packages for CUDA, $(grep -hcE '^[a-z0-9.-]+==' locks/cpu.txt) for the CPU, $(grep -hcE '^[a-z0-9.-]+==' locks/light.txt) for envcheck"

#!/usr/bin/env bash
# Refreshes uv.lock and locks/*.txt from pyproject.toml, naming the public index only.
# Run by `cli.py lock`; arguments: MODE
#
#   lock     lock again (newer releases only where pyproject.toml asks)
#   upgrade  the newest that pyproject.toml allows
#   check    change nothing; exit 1 when a file is not what pyproject.toml and uv.lock make of it
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

# torch's CPU build for Python 3.11, which is not on the public index: its version and its file's SHA-256.
TORCH_CPU_VERSION=2.13.0
TORCH_CPU_SHA256=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b

mode=$1
uv=$(find_uv)
cd "$REPO"

# The machine's own index settings must not reach a lock. UV_NO_CONFIG would also drop [tool.uv] of pyproject.toml.
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
        die 1 "uv.lock does not match pyproject.toml" "run \`just lock\`, look at what moved, commit it"
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
    # What builds the wheel in an image: the backend of pyproject.toml, with hashes.
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
    die 1 "pyproject.toml's cpu-engine does not ask for torch==$TORCH_CPU_VERSION" \
        "set TORCH_CPU_VERSION and TORCH_CPU_SHA256 in containers/lock.sh to its pin"
grep -q "^hatchling==" "$fresh/build.txt" ||
    die 1 "no hatchling in locks/build.txt" "see [build-system] in pyproject.toml"

# Nothing but the public index may be named: a mirror's host in a lock leaks, and breaks everybody else.
others=$(grep -hoE '(https?|file|ftp)://[^/" ]*' uv.lock "$fresh"/*.txt | sort -u |
    grep -vxE 'https://(pypi\.org|files\.pythonhosted\.org)' || true)
[ -z "$others" ] || die 1 "the locks name other hosts than the public index: ${others//$'\n'/ }" \
    "unset the index settings of this machine and run \`just lock\`"
if grep -lE '^(-i|-f|--index-url|--extra-index-url|--find-links|--trusted-host)' "$fresh"/*.txt; then
    die 1 "a lock carries index options"
fi

for file in light dev cu130 cpu build image-torch; do
    if [ "$mode" = check ]; then
        cmp -s "$fresh/$file.txt" "locks/$file.txt" || {
            diff "locks/$file.txt" "$fresh/$file.txt" | head -n 5 >&2 || true
            die 1 "locks/$file.txt is not what uv.lock makes of it" "run \`just lock\`, look at what moved, commit it"
        }
    else
        cp "$fresh/$file.txt" "locks/$file.txt"
    fi
done
say "locks are in step with pyproject.toml: $(grep -hcE '^[a-z0-9.-]+==' locks/cu130.txt) packages for CUDA, $(grep -hcE '^[a-z0-9.-]+==' locks/cpu.txt) for the CPU, $(grep -hcE '^[a-z0-9.-]+==' locks/light.txt) for envcheck"

#!/usr/bin/env bash
# Writes a CycloneDX bill of materials for each image, from its lock. It lists every package with its version, and the SHA-256 of
# each file that the build may install. The same lock gives the same bytes.
# `cli.py sbom` runs this script. Arguments: FOLDER TARGET...
set -euo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

folder=$1
shift
python=$(find_python)
"$python" -c 'import cyclonedx_py' 2>/dev/null || die 3 "cyclonedx-bom is not installed" "run \`just setup\`"
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

bill() { # TARGET LOCK...
    local target=$1 name count
    shift
    for name in "$@"; do cat "$REPO/locks/$name"; done >"$work/$target.txt"
    "$python" -m cyclonedx_py requirements "$work/$target.txt" --pyproject "$REPO/pyproject.toml" --mc-type application \
        --index-url https://pypi.org/simple --spec-version 1.6 --output-reproducible --output-format JSON -o "$folder/$target.cdx.json" 2>"$work/log" ||
        { cat "$work/log" >&2 && die 70 "cyclonedx-py could not write the bill of materials of $target"; }
    count=$("$python" - "$folder/$target.cdx.json" <<'END'
import json, sys

bill = json.load(open(sys.argv[1]))
bare = [c["name"] for c in bill["components"] if not any(r.get("hashes") for r in c.get("externalReferences", []))]
if bare:
    sys.exit(f"the lock has no hash for {', '.join(bare)}")
print(len(bill["components"]))
END
    ) || die 1 "a package of $target has no hash" "run \`just lock\`"
    say "$folder/$target.cdx.json: $count packages, each with hashes"
}

for target in "$@"; do
    case "$target" in
        envcheck) bill envcheck light.txt ;;
        train-cpu) bill train-cpu image-torch.txt cpu.txt ;;
        train) bill train cu130.txt ;;
    esac
done

#!/usr/bin/env bash
# Looks up the locked packages in the vulnerability database of the public index.
# `cli.py audit` runs this script. Arguments: LOCK...
#
# containers/audit-accepted.txt lists the vulnerabilities that were examined and accepted: one identifier per line, then # and the reason.
# Exit codes: 0 no vulnerability that is not accepted, 1 at least one such vulnerability, 4 the database has no answer for at least one package.
set -uo pipefail
# shellcheck source=containers/lib.sh
. "$(dirname "$0")/lib.sh"

python=$(find_python)
"$python" -c 'import pip_audit' 2>/dev/null || die 3 "pip-audit is not installed" "run \`just setup\`"
accepted=()
while read -r identifier _; do
    case "$identifier" in "" | \#*) ;; *) accepted+=(--ignore-vuln "$identifier") ;; esac
done <"$REPO/containers/audit-accepted.txt"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
worst=0
for lock in "$@"; do
    file=$REPO/locks/$lock.txt
    [ -e "$file" ] || die 2 "no lock named $lock"
    # --disable-pip: the lock is complete and has hashes, so pip need not resolve or download anything.
    "$python" -m pip_audit --progress-spinner off --disable-pip --require-hashes -r "$file" "${accepted[@]}" \
        --format json --output "$work/$lock.json" 2>"$work/log" || true
    # If the database has no answer for a package, pip-audit reports it as skipped and ends with 0. Here this is not a pass.
    code=0
    "$python" - "$lock" "$work/$lock.json" <<'END' || code=$?
import json, pathlib, sys

lock, path = sys.argv[1], pathlib.Path(sys.argv[2])
packages = json.loads(path.read_text())["dependencies"] if path.exists() else []
known = [(p["name"], p["version"], v) for p in packages for v in p.get("vulns", [])]
unknown = [p["skip_reason"] for p in packages if "skip_reason" in p]
for name, version, found in known:
    print(f"locks/{lock}.txt: {name} {version}: {found['id']}, fixed in {', '.join(found['fix_versions']) or 'no release'}")
if unknown or not packages:
    why = f" (the first: {unknown[0]})" if unknown else ""
    print(f"locks/{lock}.txt: the database has no answer for {len(unknown) or 'any'} of {len(packages)} packages{why}")
elif not known:
    print(f"locks/{lock}.txt: {len(packages)} packages, no known vulnerability")
sys.exit(1 if known else 4 if unknown or not packages else 0)
END
    case "$code:$worst" in
        0:* | 4:1) ;;
        *) worst=$code ;;
    esac
done
[ "$worst" != 1 ] || say "fix: raise the version of the package in pyproject.toml and run \`just lock\`, or add the vulnerability to containers/audit-accepted.txt with a reason"
[ "$worst" != 4 ] || say "the database has no answer for some packages, so it is unknown whether they have vulnerabilities: try again later"
exit "$worst"

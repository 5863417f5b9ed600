#!/bin/sh
# Ends with 0 if the container is healthy: `envcheck` must start. If TOOLKIT_RUN_DIR names a run folder and its first step was
# written, the last step must also have been written within TOOLKIT_STALL_S seconds (default 1800).
set -eu

envcheck --version >/dev/null 2>&1 || {
    echo "envcheck does not start"
    exit 1
}
timings="${TOOLKIT_RUN_DIR:-}/timings.jsonl"
if [ -n "${TOOLKIT_RUN_DIR:-}" ] && [ -e "$timings" ]; then
    age=$(($(date +%s) - $(stat -c %Y "$timings")))
    if [ "$age" -gt "${TOOLKIT_STALL_S:-1800}" ]; then
        echo "the run has written no step for $age s ($timings)"
        exit 1
    fi
fi

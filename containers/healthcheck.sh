#!/bin/sh
# Is the container doing its work? Healthy while the command line answers and, for a run whose folder is known
# (TOOLKIT_RUN_DIR), while a step was written within TOOLKIT_STALL_S seconds (default 1800) once there is a first one.
set -eu

envcheck --version >/dev/null 2>&1 || {
    echo "envcheck does not start"
    exit 1
}
timings="${TOOLKIT_RUN_DIR:-}/timings.jsonl"
if [ -n "${TOOLKIT_RUN_DIR:-}" ] && [ -e "$timings" ]; then
    age=$(($(date +%s) - $(stat -c %Y "$timings")))
    if [ "$age" -gt "${TOOLKIT_STALL_S:-1800}" ]; then
        echo "no step for $age s ($timings)"
        exit 1
    fi
fi

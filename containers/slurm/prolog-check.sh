#!/usr/bin/env bash
# For slurm.conf's Prolog (or HealthCheckProgram): is this node fit for GPU jobs?
#   Prolog=/etc/slurm/prolog-check.sh            HealthCheckProgram=/etc/slurm/prolog-check.sh
#
# A Prolog that fails drains the node, so this fails for one reason only: the check established that this node is bad (exit code
# 3). Everything else lets the job start: a user's mistake (1, 2), a card that is busy (4), what could not be established (5), a
# defect of ours (70), a check that hangs or is not installed. It knows no run file and no job, so no user can make it fail.
#
# Slurm requeues the job of a failed Prolog held; SchedulerParameters=nohold_on_prolog_fail lets it start elsewhere at once.
#
#   ENVCHECK        the command, default: envcheck from PATH, else `apptainer exec --nv $SIF envcheck`
#   CHECK_SECONDS   how long it may take, default 20 (Slurm kills a Prolog after PrologEpilogTimeout)
set -u

log() { logger -t toolkit-prolog -- "$*" 2>/dev/null || echo "toolkit-prolog: $*" >&2; }

if [ -n "${ENVCHECK:-}" ]; then
    read -ra check <<<"$ENVCHECK"
elif command -v envcheck >/dev/null; then
    check=(envcheck)
elif [ -n "${SIF:-}" ] && command -v apptainer >/dev/null; then
    check=(apptainer exec --nv "$SIF" envcheck)
else
    log "envcheck is not installed here: nothing checked"
    exit 0
fi

# Nothing of the job's environment: CUDA_VISIBLE_DEVICES or LD_PRELOAD of a user must not decide on a node.
report=$(env -i PATH="$PATH" HOME=/tmp LANG=C.UTF-8 TOOLKIT_CACHE=/tmp \
    timeout --kill-after=5 "${CHECK_SECONDS:-20}" "${check[@]}" check --node 2>&1)
code=$?

case "$code" in
    0) exit 0 ;;
    3)
        log "this node is bad: $report"
        exit 1
        ;;
    124 | 137) log "the check took longer than ${CHECK_SECONDS:-20} s: nothing established" ;;
    *) log "exit code $code, not the node's fault as far as established: $report" ;;
esac
exit 0

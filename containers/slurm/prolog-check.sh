#!/usr/bin/env bash
# Checks whether this node is fit for GPU jobs. It is for slurm.conf's Prolog or HealthCheckProgram:
#   Prolog=/etc/slurm/prolog-check.sh            HealthCheckProgram=/etc/slurm/prolog-check.sh
#
# If a Prolog fails, Slurm drains the node. So this script fails for one reason only: the check found that this node is bad (exit
# code 3). In all other cases the job starts: a user's mistake (1, 2), a card that is busy (4), a check without a result (5), a
# defect of the toolkit (70), or a check that hangs or is not installed. The script reads no run file and no job, so no user can
# make it fail.
#
# Slurm requeues the job of a failed Prolog in the state "held". With SchedulerParameters=nohold_on_prolog_fail the job starts on
# another node at once.
#
#   ENVCHECK        the command of the check; default: envcheck from PATH, else `apptainer exec --nv $SIF envcheck`
#   CHECK_SECONDS   the time limit of the check; default: 20 (Slurm kills a Prolog after PrologEpilogTimeout)
set -u

log() { logger -t toolkit-prolog -- "$*" 2>/dev/null || echo "toolkit-prolog: $*" >&2; }

if [ -n "${ENVCHECK:-}" ]; then
    read -ra check <<<"$ENVCHECK"
elif command -v envcheck >/dev/null; then
    check=(envcheck)
elif [ -n "${SIF:-}" ] && command -v apptainer >/dev/null; then
    check=(apptainer exec --nv "$SIF" envcheck)
else
    log "envcheck is not installed on this node, so the node was not checked"
    exit 0
fi

# The environment of the job is not used, because a user's CUDA_VISIBLE_DEVICES or LD_PRELOAD must not affect the result.
report=$(env -i PATH="$PATH" HOME=/tmp LANG=C.UTF-8 TOOLKIT_CACHE=/tmp \
    timeout --kill-after=5 "${CHECK_SECONDS:-20}" "${check[@]}" check --node 2>&1)
code=$?

case "$code" in
    0) exit 0 ;;
    3)
        log "this node is bad: $report"
        exit 1
        ;;
    124 | 137) log "the check took longer than ${CHECK_SECONDS:-20} s, so it has no result" ;;
    *) log "the check ended with exit code $code, but did not find that this node is bad: $report" ;;
esac
exit 0

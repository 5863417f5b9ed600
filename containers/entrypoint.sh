#!/bin/sh
# The entry point of every image, and the %runscript of the SIF: makes a home for whoever calls, runs the pre-flight
# before a training command, then becomes the command (exec: signals reach it, its exit code is the container's).
#
#   TOOLKIT_PREFLIGHT   check (default): run `envcheck check --config RUN.yaml` first and leave with its exit code
#                       warn: run it, print it, go on whatever it says      skip: do not run it
#   TOOLKIT_CACHE       where caches go; default: the first writable of /cache, $HOME, $TMPDIR, /tmp, /dev/shm
#   TOOLKIT_CUDA_COMPAT 1: use the forward-compatibility libraries, if this driver is older than they are
set -eu

say() { echo "toolkit-entrypoint: $*" >&2; }

writable() { # DIR: can this caller make a file there? Asked by doing, since root squash and read-only mounts lie to `test -w`.
    probe="$1/.toolkit-$$"
    (umask 077 && mkdir "$probe") 2>/dev/null && rmdir "$probe"
}

# ---- a place to write ----------------------------------------------------------------------------------------
[ -z "${TOOLKIT_CACHE:-}" ] || (umask 077 && mkdir -p "$TOOLKIT_CACHE") 2>/dev/null || true
place=""
for candidate in "${TOOLKIT_CACHE:-}" /cache "${HOME:-}" "${TMPDIR:-}" /tmp /dev/shm; do
    case "$candidate" in "" | /) continue ;; esac
    if writable "$candidate"; then
        place=$candidate
        break
    fi
    if [ "$candidate" = "${TOOLKIT_CACHE:-}" ]; then
        say "error: TOOLKIT_CACHE=$candidate cannot be written by uid $(id -u), gid $(id -g)"
        say "  fix: mount a folder of yours there, or unset TOOLKIT_CACHE"
        exit 1
    fi
done
if [ -z "$place" ]; then
    say "error: no writable place for caches: tried /cache, HOME=${HOME:-unset}, TMPDIR=${TMPDIR:-unset}, /tmp, /dev/shm as uid $(id -u), gid $(id -g)"
    say "  fix: mount one, for example --tmpfs /cache:rw,mode=1777 or -v \"\$PWD/cache:/cache\", or set TOOLKIT_CACHE"
    exit 1
fi

# Temporary files: with a read-only root and no mount on /tmp, Python finds no place for any.
if ! writable "${TMPDIR:-/tmp}"; then
    export TMPDIR="$place"
fi

# ---- who calls: an unknown uid has no passwd entry, and torch and Triton ask for one ----------------------------
given_home=${HOME:-}
if [ -z "$given_home" ] || [ "$given_home" = / ] || ! writable "$given_home"; then
    HOME=$place
fi
USER=${USER:-$(id -un 2>/dev/null || echo "uid$(id -u)")}
LOGNAME=${LOGNAME:-$USER}
export HOME USER LOGNAME

# ---- caches: the caller's own settings win ----------------------------------------------------------------------
# Large and worth keeping (models) and small and made again (compiled kernels) alike; compiled files go beneath the uid,
# because two users of one /cache must not run each other's code.
case "$place" in
    /cache | "${TOOLKIT_CACHE:-/cache}") caches=$place ;;
    # A home folder: where each of them looks without us.
    "$given_home") caches=$place/.cache ;;
    *) caches=$place ;;
esac
compiled="$caches/toolkit-$(id -u)"
# A tmpfs of Docker's is mounted noexec unless told otherwise: kernels would be compiled there and could not be loaded.
executable() { # DIR: does a file in it run?
    probe="$1/.toolkit-$$"
    (umask 077 && printf '#!/bin/sh\n' >"$probe" && chmod 0700 "$probe") 2>/dev/null && "$probe" 2>/dev/null
    code=$?
    rm -f "$probe"
    return "$code"
}
if ! executable "$place"; then
    elsewhere=""
    for candidate in "$HOME" "${TMPDIR:-}" /tmp /dev/shm; do
        if [ -n "$candidate" ] && writable "$candidate" && executable "$candidate"; then
            elsewhere=$candidate
            break
        fi
    done
    if [ -n "$elsewhere" ]; then
        compiled="$elsewhere/toolkit-$(id -u)"
    elif [ "${1:-}" = toolkit ]; then
        say "warning: $place is mounted noexec, and there is no other place to write: compiled kernels cannot be loaded from it"
        say "  fix: --tmpfs /cache:rw,exec,mode=1777, or mount a folder at /cache"
    fi
fi
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$caches}"
export HF_HOME="${HF_HOME:-$caches/huggingface}"
export TORCH_HOME="${TORCH_HOME:-$caches/torch}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$compiled/inductor}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$compiled/torch-extensions}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$compiled/triton}"
export TRITON_HOME="${TRITON_HOME:-$compiled}"
export VLLM_CACHE_ROOT="${VLLM_CACHE_ROOT:-$compiled/vllm}"
export VLLM_CONFIG_ROOT="${VLLM_CONFIG_ROOT:-$caches/vllm-config}"
export FLASHINFER_WORKSPACE_BASE="${FLASHINFER_WORKSPACE_BASE:-$compiled}"
export NUMBA_CACHE_DIR="${NUMBA_CACHE_DIR:-$compiled/numba}"
export CUDA_CACHE_PATH="${CUDA_CACHE_PATH:-$compiled/cuda}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$caches/matplotlib}"
# A run that asks a telemetry host from a closed node waits for the time-out; nobody asked for it either.
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}" HF_HUB_DISABLE_TELEMETRY="${HF_HUB_DISABLE_TELEMETRY:-1}"

# ---- threads: a container may use fewer CPUs than it sees; one thread for each that it sees would fight for them ----------
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    # cgroup v2 has both numbers in one file ("max 100000" or "200000 100000"), v1 one in each of two.
    limits=$(cat "${TOOLKIT_CPU_MAX:-/sys/fs/cgroup/cpu.max}" 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us 2>/dev/null || true)
    quota=$(echo "$limits" | awk 'NR == 1 { q = $1; p = $2 } NR == 2 { p = $1 } END { if (q + 0 > 0 && p + 0 > 0) print int((q + p - 1) / p) }')
    if [ -n "$quota" ] && [ "$quota" -lt "$(nproc)" ]; then
        export OMP_NUM_THREADS="$quota"
    fi
fi

# ---- CUDA forward compatibility: only when asked, only when this driver needs it --------------------------------
if [ "${TOOLKIT_CUDA_COMPAT:-0}" = 1 ]; then
    compat=${TOOLKIT_COMPAT_DIR:-/opt/cuda-compat}
    library=""
    for file in "$compat"/libcuda.so.*.*; do
        if [ -e "$file" ]; then library=$file; fi
    done
    # NVRM version: NVIDIA UNIX (Open) Kernel Module for x86_64  580.65.06  Release Build ...: the first word of numbers and dots
    driver=$(sed -n 's/^NVRM version:.* \([0-9][0-9]*\)\.[0-9][0-9.]* .*/\1/p' \
        "${TOOLKIT_PROC_DRIVER:-/proc/driver/nvidia/version}" 2>/dev/null || true)
    ours=${library##*libcuda.so.}
    ours=${ours%%.*}
    if [ -z "$library" ]; then
        say "error: TOOLKIT_CUDA_COMPAT=1, and this image has no compatibility libraries"
        say "  fix: use the \`train\` image, or unset TOOLKIT_CUDA_COMPAT"
        exit 1
    elif [ -z "$driver" ]; then
        say "error: TOOLKIT_CUDA_COMPAT=1, and the version of the driver cannot be read"
        say "  fix: pass the GPU in (--gpus all, --nv), or unset TOOLKIT_CUDA_COMPAT"
        exit 3
    elif [ "$driver" -ge "$ours" ]; then
        say "TOOLKIT_CUDA_COMPAT=1 not applied: driver $driver is as new as the libraries ($ours), which would break it"
    else
        export LD_LIBRARY_PATH="$compat${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        say "driver $driver is older than CUDA 13.0 wants: using the compatibility libraries ($ours)"
    fi
fi

# ---- pre-flight --------------------------------------------------------------------------------------------------
# `toolkit train RUN.yaml OPTIONS...`: what the options change in the run file is changed for the pre-flight too.
run_file=""
if [ "${1:-}" = toolkit ] && [ "${2:-}" = train ]; then
    run_file=$(
        shift 2
        while [ "$#" -gt 0 ]; do
            case "$1" in
                --set | --output-dir | --max-steps | --resume | --nproc-per-node) [ "$#" -lt 2 ] || shift ;;
                -*) ;;
                *)
                    printf '%s' "$1"
                    break
                    ;;
            esac
            shift
        done
    )
fi
check_run_file() { # TRAIN-ARGUMENTS...
    arguments=$#
    while [ "$arguments" -gt 0 ]; do
        # The arguments are turned round in place: each is taken from the front, what the check needs goes to the back.
        argument=$1
        shift
        arguments=$((arguments - 1))
        case "$argument" in
            --set | --output-dir)
                [ "$arguments" -gt 0 ] || break
                if [ "$argument" = --set ]; then changed=$1; else changed=runtime.output_dir=$1; fi
                set -- "$@" --set "$changed"
                shift
                arguments=$((arguments - 1))
                ;;
            --nproc-per-node)
                [ "$arguments" -gt 0 ] || break
                [ "$1" = auto ] || export WORLD_SIZE="$1" # each process checks its own GPU as well
                shift
                arguments=$((arguments - 1))
                ;;
            --nproc-per-node=auto) ;;
            --nproc-per-node=*) export WORLD_SIZE="${argument#*=}" ;;
            --set=*) set -- "$@" "$argument" ;;
            --output-dir=*) set -- "$@" --set "runtime.output_dir=${argument#*=}" ;;
        esac
    done
    envcheck check --config "$run_file" "$@"
}
preflight=${TOOLKIT_PREFLIGHT:-check}
case "$preflight" in
    check | warn | skip) ;;
    *)
        say "error: TOOLKIT_PREFLIGHT=$preflight: check, warn or skip"
        exit 2
        ;;
esac
if [ -n "$run_file" ] && [ "$preflight" != skip ]; then
    # The report goes to stderr, so that stdout stays the command's own.
    verdict=0
    (
        shift 2
        check_run_file "$@"
    ) >&2 || verdict=$?
    if [ "$verdict" -ne 0 ] && [ "$preflight" = check ]; then
        say "the pre-flight said no (exit code $verdict): not started. TOOLKIT_PREFLIGHT=warn starts it all the same"
        exit "$verdict"
    fi
    if [ "$verdict" -ne 0 ]; then
        say "the pre-flight said no (exit code $verdict); starting, since TOOLKIT_PREFLIGHT=warn"
    fi
fi

[ "$#" -gt 0 ] || set -- envcheck check
exec "$@"

#!/bin/sh
# The entry point of every image, and the %runscript of the SIF. It sets a home folder and cache folders that the caller can
# write, and runs the pre-flight before a training command. Then the command replaces this script (exec), so that the command
# receives signals, and its exit code is that of the container.
#
#   TOOLKIT_PREFLIGHT   check (default): run `envcheck check --config RUN.yaml` first; if it fails, end with its exit code
#                       warn: run the pre-flight and print it, but start the training even if it fails
#                       skip: do not run the pre-flight
#   TOOLKIT_CACHE       the folder for caches; default: the first writable of /cache, $HOME, $TMPDIR, /tmp, /dev/shm
#   TOOLKIT_CUDA_COMPAT 1: use the forward-compatibility libraries, if the driver is older than these libraries
set -eu

say() { echo "toolkit-entrypoint: $*" >&2; }

writable() { # DIR: whether this caller can write there. Tried with a folder, because `test -w` is wrong for root squash and read-only mounts.
    probe="$1/.toolkit-$$"
    (umask 077 && mkdir "$probe") 2>/dev/null && rmdir "$probe"
}

# ---- a folder to write to ----------------------------------------------------------------------------------------
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
        say "  fix: mount a folder there that this user can write, or unset TOOLKIT_CACHE"
        exit 1
    fi
done
if [ -z "$place" ]; then
    say "error: no writable place for caches: tried /cache, HOME=${HOME:-unset}, TMPDIR=${TMPDIR:-unset}, /tmp, /dev/shm as uid $(id -u), gid $(id -g)"
    say "  fix: mount a writable folder, for example with --tmpfs /cache:rw,mode=1777 or -v \"\$PWD/cache:/cache\", or set TOOLKIT_CACHE"
    exit 1
fi

# With a read-only root and no mount on /tmp, Python finds no folder for temporary files.
if ! writable "${TMPDIR:-/tmp}"; then
    export TMPDIR="$place"
fi

# ---- home and user name: an unknown uid has no passwd entry, but torch and Triton read them ---------------------
given_home=${HOME:-}
if [ -z "$given_home" ] || [ "$given_home" = / ] || ! writable "$given_home"; then
    HOME=$place
fi
USER=${USER:-$(id -un 2>/dev/null || echo "uid$(id -u)")}
LOGNAME=${LOGNAME:-$USER}
export HOME USER LOGNAME

# ---- caches: variables that the caller has set are not changed --------------------------------------------------
# There are caches for downloaded models and for compiled kernels. Compiled files are in a folder with the uid in its name,
# because two users of one /cache must not run each other's code.
case "$place" in
    /cache | "${TOOLKIT_CACHE:-/cache}") caches=$place ;;
    # In a home folder, use the default folder of each library.
    "$given_home") caches=$place/.cache ;;
    *) caches=$place ;;
esac
compiled="$caches/toolkit-$(id -u)"
# Docker mounts a tmpfs noexec by default. Kernels could be compiled there, but not loaded.
executable() { # DIR: whether a file in this folder can be executed
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
        say "warning: $place is mounted noexec, and no other folder is writable: compiled kernels cannot be loaded from $place"
        say "  fix: start the container with --tmpfs /cache:rw,exec,mode=1777, or mount a folder at /cache"
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
# Telemetry is off: on a node without a network, a run would wait for the time-out of the telemetry host.
export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}" HF_HUB_DISABLE_TELEMETRY="${HF_HUB_DISABLE_TELEMETRY:-1}"

# ---- threads: not one per visible CPU, because a container may have a limit below the number of visible CPUs --------------
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    # cgroup v2 has quota and period in one file ("max 100000" or "200000 100000"). cgroup v1 has one file for each.
    limits=$(cat "${TOOLKIT_CPU_MAX:-/sys/fs/cgroup/cpu.max}" 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us 2>/dev/null || true)
    quota=$(echo "$limits" | awk 'NR == 1 { q = $1; p = $2 } NR == 2 { p = $1 } END { if (q + 0 > 0 && p + 0 > 0) print int((q + p - 1) / p) }')
    if [ -n "$quota" ] && [ "$quota" -lt "$(nproc)" ]; then
        export OMP_NUM_THREADS="$quota"
    fi
fi

# ---- CUDA forward compatibility: only if TOOLKIT_CUDA_COMPAT=1 and this driver needs it -------------------------
if [ "${TOOLKIT_CUDA_COMPAT:-0}" = 1 ]; then
    compat=${TOOLKIT_COMPAT_DIR:-/opt/cuda-compat}
    library=""
    for file in "$compat"/libcuda.so.*.*; do
        if [ -e "$file" ]; then library=$file; fi
    done
    # The driver version is the first word of digits and dots in "NVRM version: NVIDIA UNIX (Open) Kernel Module for x86_64  580.65.06  ..."
    driver=$(sed -n 's/^NVRM version:.* \([0-9][0-9]*\)\.[0-9][0-9.]* .*/\1/p' \
        "${TOOLKIT_PROC_DRIVER:-/proc/driver/nvidia/version}" 2>/dev/null || true)
    ours=${library##*libcuda.so.}
    ours=${ours%%.*}
    if [ -z "$library" ]; then
        say "error: TOOLKIT_CUDA_COMPAT=1 is set, but this image has no compatibility libraries"
        say "  fix: use the \`train\` image, or unset TOOLKIT_CUDA_COMPAT"
        exit 1
    elif [ -z "$driver" ]; then
        say "error: TOOLKIT_CUDA_COMPAT=1 is set, but the version of the driver cannot be read"
        say "  fix: give the container the GPU (--gpus all, --nv), or unset TOOLKIT_CUDA_COMPAT"
        exit 3
    elif [ "$driver" -ge "$ours" ]; then
        say "TOOLKIT_CUDA_COMPAT=1 is not applied: driver $driver is not older than the compatibility libraries ($ours), which would break this driver"
    else
        export LD_LIBRARY_PATH="$compat${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        say "driver $driver is older than CUDA 13.0 requires: using the compatibility libraries ($ours)"
    fi
fi

# ---- pre-flight --------------------------------------------------------------------------------------------------
# The options of `toolkit train RUN.yaml OPTIONS...` may change values of the run file. The pre-flight gets the same changes.
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
        # Each argument is removed from the front of the list. The arguments that the check needs are appended at the end.
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
        say "error: TOOLKIT_PREFLIGHT=$preflight is not a valid value"
        say "  fix: set TOOLKIT_PREFLIGHT to check, warn or skip"
        exit 2
        ;;
esac
if [ -n "$run_file" ] && [ "$preflight" != skip ]; then
    # The report is printed to stderr, so that stdout has only the output of the command.
    verdict=0
    (
        shift 2
        check_run_file "$@"
    ) >&2 || verdict=$?
    if [ "$verdict" -ne 0 ] && [ "$preflight" = check ]; then
        say "the pre-flight failed (exit code $verdict), so the training is not started. TOOLKIT_PREFLIGHT=warn starts it even then"
        exit "$verdict"
    fi
    if [ "$verdict" -ne 0 ]; then
        say "the pre-flight failed (exit code $verdict). The training is started, because TOOLKIT_PREFLIGHT=warn is set"
    fi
fi

[ "$#" -gt 0 ] || set -- envcheck check
exec "$@"

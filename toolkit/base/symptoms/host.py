"""Texts about the machine around the cards."""

from __future__ import annotations

from toolkit.base.symptoms import numbers
from toolkit.base.symptoms.symptom import entry

ENTRIES = (
    entry(
        "shared-memory",
        "/dev/shm is too small",
        "host.shm",
        "start the container with --ipc=host or --shm-size=16g (Kubernetes: an emptyDir of medium "
        "Memory at /dev/shm)",
        1,
        "creating shared memory segment /dev/shm/nccl",
        "It is possible that dataloader's workers are out of shared memory",
        "is killed by signal: Bus error",
        "unable to open shared memory object",
        "unable to mmap {n} bytes from file <filename not specified>: Cannot allocate memory",
        "unable to write to file </torch_",
        "Shared memory is too small",
        "No space left on device: '/dev/shm",
        "No space left on device: '/psm_",
        read=numbers.shared_memory,
    ),
    entry(
        "host-memory",
        "The host's main memory, or the job's share of it, ran out",
        "host.memory",
        "ask for more host memory (--mem, --memory, resources.limits.memory), or use fewer loader "
        "workers and no offload; `envcheck check` prints what is needed",
        1,
        "Detected {n} oom_kill event",
        "Detected {n} oom-kill event",
        "oom-kill:constraint=",
        "Out of memory: Killed process",
        "Memory cgroup out of memory",
        "Some of the step tasks have been OOM Killed",
        "Exceeded job memory limit",
        "OOMKilled",
        "exit code 137",
        "exitcode  : -9",
        "exitcode: -9",
        "died with <Signals.SIGKILL: 9>",
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "[Errno 12] Cannot allocate memory",
        "A process in the process pool was terminated abruptly while the future was running",
    ),
    entry(
        "limits",
        "A limit of the account is too low",
        "host.limits",
        "raise it: ulimit -n 65536, ulimit -u, ulimit -l unlimited (docker: --ulimit memlock=-1 "
        "--ulimit "
        "nofile=65536)",
        1,
        "[Errno 24] Too many open files",
        "received 0 items of ancdata",
        "RLIMIT_MEMLOCK is {n}",
        "Call to ibv_reg_mr failed",
        "can't start new thread",
        "fork: retry: Resource temporarily unavailable",
        "pthread_create failed",
    ),
    entry(
        "disk-full",
        "A disk is full",
        "host.disk",
        "free space, or point HF_HOME, TMPDIR and runtime.output_dir to a folder with room "
        "(`envcheck check --only host` prints what is free)",
        1,
        "[Errno 28] No space left on device",
        "No space left on device (os error 28)",
        "[Errno 122] Disk quota exceeded",
        "Disk quota exceeded",
        "Not enough free disk space to download the file",
        "PytorchStreamWriter failed writing file",
        unless=("shared-memory",),
    ),
    entry(
        "not-writable",
        "A folder cannot be written",
        "host.writable",
        "point HF_HOME, TMPDIR and runtime.output_dir to folders that this account may write",
        1,
        "[Errno 30] Read-only file system",
        "[Errno 13] Permission denied: '",
        "Read-only file system (os error 30)",
        "There was a problem when trying to write in your cache folder",
    ),
    entry(
        "clock",
        "The node's clock is wrong",
        "host.clock",
        "have the node's clock set (chrony, NTP), or use another node",
        3,
        "certificate is not yet valid",
        "RequestTimeTooSkewed",
        "Signature not yet current",
        "Clock skew detected",
    ),
    entry(
        "user",
        "The account has no name in this container",
        "host.user",
        "set USER and HOME, add the account to /etc/passwd, or start the container as a user that "
        "it "
        "knows",
        1,
        "getpwuid(): uid not found",
        "I have no name!",
        "No username set in the environment",
    ),
    entry(
        "cpus",
        "There are fewer CPUs than the run's processes want",
        "host.cpus",
        "ask for more CPUs (--cpus-per-task, --cpus), or set fewer dataloader_num_workers and "
        "reward.max_workers",
        1,
        "Our suggested max number of worker in current system is {n}",
        "CPU binding outside of job step allocation",
        "Requested CPU count {n} is greater than the available",
    ),
)

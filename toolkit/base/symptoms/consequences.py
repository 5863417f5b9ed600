"""Error texts of a process that fails only because another process failed first. If a log or
traceback has any other known error, these texts are ignored.
"""

from __future__ import annotations

from toolkit.base.symptoms.symptom import entry

_FIRST = "none: the first error of the log names the cause"

ENTRIES = (
    entry(
        "rank-waited",
        "The ranks waited for each other longer than their limit",
        "speed.group_link, speed.p2p",
        "search the logs of all ranks for the first error and paste it. If there is none, a rank "
        "was busy for longer than the limit (a slow reward, a download), or the link between the "
        "ranks hangs. `envcheck check --only speed -v` shows how the cards are linked",
        5,
        "Watchdog caught collective operation timeout",
        "Some NCCL operations have failed or timed out",
        "Timeout at NCCL work",
    ),
    entry(
        "rank-ended",
        "Another rank ended first",
        _FIRST,
        "search the logs of all ranks for the first error (the earliest time) and paste that error",
        5,
        "NCCL error: remote process exited or there was a network error",
        "remote process exited or there was a network error",
        "is setting up NCCL communicator and{..}ncclUniqueId from",
        "Connection closed by peer [",  # a message of gloo, with the address
        "Connection closed by remote peer",
    ),
    entry(
        "engine-ended",
        "An engine process ended, and its own error is earlier in the log",
        _FIRST,
        "search the log upwards for the first traceback of EngineCore or of a worker, and paste "
        "the whole log",
        5,
        "Engine core initialization failed. See root cause above",
        "EngineCore encountered an issue. See stack trace (above) for the root cause",
        "Engine process failed to start. See stack trace for the root cause",
        "WorkerProc initialization failed due to an exception in a background process",
    ),
)

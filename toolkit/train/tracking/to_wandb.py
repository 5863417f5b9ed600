"""Send a run to Weights & Biases. The run is online if an API key is set and the server answers,
else offline.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.tracking.run_info import RunInfo

DEFAULT_SERVER = "https://api.wandb.ai"
CONNECT_LIMIT_S = 3.0
KEY_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


class WandbTracker:
    """Sends numbers and completions. The x axis of all charts is a metric ``step``, which this
    class sends with the numbers.

    W&B's built-in step cannot be used, because it must always increase, and a resumed run repeats
    steps.
    """

    def __init__(self, run_info: RunInfo) -> None:
        import wandb  # noqa: PLC0415 - takes seconds, so only for runs that use it

        self._wandb = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if _can_connect() else "offline")
        options: dict[str, Any] = {"mode": mode}  # wandb.init raises if the mode is invalid
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run_info.project,
            name=run_info.name,
            id=run_info.run_id,
            resume="allow" if mode == "online" else None,
            config=dict(run_info.config),
            dir=str(run_info.run_dir),
            **options,
            settings=wandb.Settings(console="off", quiet=True, disable_git=True, save_code=False),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.destination = (
            f"offline; upload the run with `wandb sync {run_info.run_dir}/wandb/offline-run-*`"
            if mode == "offline"
            else f"{mode} {getattr(self._run, 'url', None) or ''}".rstrip()
        )

    def log_row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of one training step or evaluation."""
        self._run.log({**numbers, "step": step})

    def log_table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send completions as a W&B table."""
        if rows:
            names = list(rows[0])
            data = [[row.get(name) for name in names] for row in rows]
            table = self._wandb.Table(columns=names, data=data, allow_mixed_types=True)
            self._run.log({"completions": table, "step": step})

    def close(self) -> None:
        """Send the queued values and end the run in W&B."""
        self._run.finish()


def _can_connect() -> bool:
    """Whether W&B can be used online. This is the case if an API key is set and the server accepts
    a connection.

    Behind a proxy, the connection is not tested, and only the API key is required.
    """
    if not any(os.environ.get(name) for name in KEY_VARIABLES) and not _has_netrc_key():
        return False
    if getproxies():
        return True
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or DEFAULT_SERVER)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        with socket.create_connection((url.hostname or "", port), timeout=CONNECT_LIMIT_S):
            return True
    except OSError:
        return False


def _has_netrc_key() -> bool:
    """Whether the netrc file contains an API key for the server. `wandb login` stores it there."""
    import netrc  # noqa: PLC0415 - only this function needs it

    host = urlsplit(os.environ.get("WANDB_BASE_URL") or DEFAULT_SERVER).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False

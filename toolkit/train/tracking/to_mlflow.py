"""Send a run to MLflow. The environment variable MLFLOW_TRACKING_URI names the server. If it is not
set, MLflow writes files in ``mlruns/`` of the run folder.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from toolkit.train.tracking.start import flat_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.tracking.start import RunInfo

FOLDER = "mlruns"
LONGEST = 500  # the maximum number of characters of a parameter's value
AT_ONCE = 100  # the maximum number of parameters in one call


class MlflowTracker:
    """Sends metrics with their step, the config as MLflow parameters, and completions as tables in
    the artifacts of the MLflow run.
    """

    def __init__(self, start: RunInfo) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # MLflow 3 needs this setting to use a folder of files and not a database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (start.run_dir.resolve() / FOLDER).as_uri()
        import mlflow  # noqa: PLC0415 - takes seconds, so only for runs that use it
        from mlflow.entities import Metric, Param  # noqa: PLC0415 - as above

        self._metric = Metric
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self.note = f"{uri}"
        known = start.ids.get("mlflow") if start.resumed else None
        if known is not None:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(start.project)
        experiment = found.experiment_id if found else self._client.create_experiment(start.project)
        self._run_id = self._client.create_run(experiment, run_name=start.name).info.run_id
        start.remember("mlflow", self._run_id)
        values = [Param(k, str(v)[:LONGEST]) for k, v in flat_config(start.config).items()]
        for begin in range(0, len(values), AT_ONCE):
            self._client.log_batch(self._run_id, params=values[begin : begin + AT_ONCE])

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of one training step or evaluation in one call."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send the completions of a step as a separate file, because MLflow cannot append to a
        file.
        """
        if rows:
            columns = {name: [row.get(name) for row in rows] for name in rows[0]}
            self._client.log_table(self._run_id, columns, f"completions/step-{step:06d}.json")

    def close(self) -> None:
        """Mark the run in MLflow as finished."""
        self._client.set_terminated(self._run_id)

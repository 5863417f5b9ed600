"""Send a run to MLflow. The environment variable MLFLOW_TRACKING_URI names the server. If it is not
set, MLflow writes files in ``mlruns/`` of the run folder.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from toolkit.train.tracking.run_info import flat_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.train.tracking.run_info import RunInfo

FOLDER = "mlruns"
MAX_VALUE_CHARACTERS = 500  # the maximum number of characters of a parameter's value
PARAMETERS_PER_CALL = 100  # the maximum number of parameters in one call


class MlflowTracker:
    """Sends metrics with their step, the config as MLflow parameters, and completions as tables in
    the artifacts of the MLflow run.
    """

    def __init__(self, run_info: RunInfo) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # MLflow 3 needs this setting to use a folder of files and not a database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (run_info.run_dir.resolve() / FOLDER).as_uri()
        import mlflow  # noqa: PLC0415 - takes seconds, so only for runs that use it
        from mlflow.entities import Metric, Param  # noqa: PLC0415 - as above

        self._metric = Metric
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self.destination = f"{uri}"
        earlier_run_id = run_info.tracker_ids.get("mlflow") if run_info.resumed else None
        if earlier_run_id is not None:
            self._run_id = earlier_run_id
            self._client.update_run(earlier_run_id, status="RUNNING")
            return
        existing = self._client.get_experiment_by_name(run_info.project)
        experiment = (
            existing.experiment_id if existing else self._client.create_experiment(run_info.project)
        )
        self._run_id = self._client.create_run(experiment, run_name=run_info.name).info.run_id
        run_info.save_tracker_id("mlflow", self._run_id)
        parameters = [
            Param(k, str(v)[:MAX_VALUE_CHARACTERS]) for k, v in flat_config(run_info.config).items()
        ]
        for first in range(0, len(parameters), PARAMETERS_PER_CALL):
            self._client.log_batch(
                self._run_id, params=parameters[first : first + PARAMETERS_PER_CALL]
            )

    def log_row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of one training step or evaluation in one call."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def log_table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send the completions of a step as a separate file, because MLflow cannot append to a
        file.
        """
        if rows:
            columns = {name: [row.get(name) for row in rows] for name in rows[0]}
            self._client.log_table(self._run_id, columns, f"completions/step-{step:06d}.json")

    def close(self) -> None:
        """Mark the run in MLflow as finished."""
        self._client.set_terminated(self._run_id)

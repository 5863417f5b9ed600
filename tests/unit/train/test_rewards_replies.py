"""The run checks each reply from the process of a reward before it uses the reply. A reward cannot
log a metric under a name that the run uses.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from toolkit.base.errors import ConfigError
from toolkit.config.run_config import (
    ModelSection,
    RewardFunction,
    RewardSection,
    RunConfig,
    RuntimeSection,
)
from toolkit.train.metric_names import LEADING_METRICS
from toolkit.train.report.metrics_log import metrics_row
from toolkit.train.rewards import load_rewards, worker_channel
from toolkit.train.rewards.loggable_values import with_safe_log_functions
from toolkit.train.rewards.worker_replies import is_valid

if TYPE_CHECKING:
    from pathlib import Path

FORGING_MODULE = """\
import json, os, sys

def _send(text):
    data = text.encode()
    os.write(int(sys.argv[2]), len(data).to_bytes(8, "big") + data)

_requests = 1  # the load of this module

def score(completions, **kwargs):
    global _requests
    _requests += 1
    _send(completions[0].replace("NUMBER", str(_requests)))
    return [0.5]

def odd(completions, **kwargs):
    from toolkit.base.errors import ConfigError
    raise ConfigError(object(), where=5, fix=[1])
"""
INVALID = "sent an invalid reply from its process"
FORGED_REPLIES = {
    '{"id": []}': INVALID,
    '{"id": NUMBER, "error": [{}, [], 7, {}]}': INVALID,
    '{"id": NUMBER, "found": [Infinity]}': "returned inf, which is not a finite 32-bit number",
    f'{{"id": NUMBER, "found": [1{"0" * 400}]}}': "which is not a finite 32-bit number",
    '{"id": NUMBER, "found": ["5"]}': "returned a str as a reward",
    '{"id": NUMBER, "logged": [["os", "system", 1]], "found": [1]}': INVALID,
}


def load_reward(folder: Path, name: str, code: str = FORGING_MODULE) -> Any:
    (folder / "sends.py").write_text(code)
    config = RunConfig(
        model=ModelSection(model_name="m"),
        reward=RewardSection(functions=(RewardFunction(name=f"sends:{name}"),), timeout_s=20),
        grpo={"seed": 3},
        runtime=RuntimeSection(allow_code=("sends",)),
        source=str(folder / "run.yaml"),
    )
    (found,) = load_rewards(config, folder / "out").functions
    return found


def test_a_forged_reply_of_a_reward_is_rejected(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reward = load_reward(tmp_path, "score")
    for reply, message in FORGED_REPLIES.items():
        with pytest.raises(ConfigError) as refused:
            reward(prompts=["p"], completions=[reply])
        assert message in refused.value.message, reply
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_of_the_toolkit_with_odd_fields_is_an_error_of_the_reward(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="reward odd raised TypeError: object"):
        load_reward(tmp_path, "odd")(prompts=["p"], completions=["c"])
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("reply", ["{}", '{"misbehaved": []}', '{"function": "1"}'])
def test_a_forged_reply_during_the_import_is_rejected(tmp_path: Path, reply: str) -> None:
    text = json.dumps({"id": 1, **json.loads(reply)})
    with pytest.raises(ConfigError, match=f"reward sends:score {INVALID} while"):
        load_reward(tmp_path, "score", f"{FORGING_MODULE}\n_send({text!r})\n")


@pytest.mark.parametrize(
    ("request_kind", "reply", "valid"),
    [
        ("tool", {"value": "x"}, True),
        ("tool", {"value": 5}, False),
        ("tool", {"refused": "no"}, True),
        ("tool", {"refused": ["no"]}, False),
        ("tool", {"misbehaved": ["raised", None, None]}, True),
        ("tool", {"misbehaved": [None]}, False),
        ("episode", {"text": "x", "reward": 1.0, "done": False}, True),
        ("episode", {"text": "x", "reward": float("nan"), "done": False}, False),
        ("episode", {"text": "x", "reward": 1.0}, False),
        ("problems", {"rows": [{"prompt": "x"}]}, True),
        ("problems", {"rows": ["x"]}, False),
        ("load", {"tool": 0, "schema": {}}, True),
        ("load", {"tool": True, "schema": {}}, False),
        ("load", {"episodes": 0, "schema": []}, False),
        ("load", {"error": ["ConfigError", "x", None, None]}, True),
    ],
)
def test_the_form_of_a_reply(request_kind: str, reply: dict[str, Any], valid: bool) -> None:
    assert is_valid({"do": request_kind}, reply) is valid


@pytest.mark.parametrize("kind", [*worker_channel._DECODERS])
@pytest.mark.parametrize("value", [[], {}, None, -1, "x", [10**15], [[10**30], "AAAA"]])
def test_a_value_of_the_data_that_looks_like_a_tag(kind: str, value: Any) -> None:
    """Unpacking gives the value itself or the value that the tag encodes; it never raises."""
    worker_channel.unpack(
        worker_channel.pack({"\0toolkit": kind, "value": value})[worker_channel.HEADER_BYTES :]
    )


@pytest.mark.parametrize(
    "name", [*LEADING_METRICS, "train_runtime", "eval_x", "eval/x", "sampling/x"]
)
def test_a_reward_cannot_log_under_a_name_of_the_run(name: str) -> None:
    kept: list[Any] = []
    log = with_safe_log_functions({"log_metric": lambda *both: kept.append(both)})["log_metric"]
    with pytest.raises(ValueError, match="the run itself uses"):
        log(name, 1.0)
    log("rewards/mine/length", 1.0)
    assert kept == [("rewards/mine/length", 1.0)]


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return [value]


@pytest.mark.parametrize(
    ("value", "error"),
    [(5, TypeError), (None, TypeError), ("abcd", TypeError), (cyclic(), ValueError)],
)
def test_a_column_is_a_list_of_values(value: Any, error: type[Exception]) -> None:
    kept: list[Any] = []
    log = with_safe_log_functions({"log_extra": lambda *both: kept.append(both)})["log_extra"]
    with pytest.raises(error, match="log_extra"):
        log("mine", value)
    log("mine", [{"a": [1]}, "x"])
    assert kept == [("mine", [{"a": [1]}, "x"])]


def test_a_logged_step_does_not_replace_the_step_of_the_row() -> None:
    assert metrics_row(3, {"step": 9, "loss": 1.0})["step"] == 3

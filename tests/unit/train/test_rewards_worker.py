"""Rewards of the user in their worker process. Whatever they do there, it affects neither the run,
nor its files, nor the next reward.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from toolkit.base.errors import ConfigError
from toolkit.config.run_config import (
    ModelSection,
    RewardFunction,
    RewardSection,
    RunConfig,
    RuntimeSection,
)
from toolkit.train.checkpointing.stop_signals import StepAbandoned, StopSignals
from toolkit.train.rewards import load_rewards
from toolkit.train.rewards.error_policy import AsyncGuardedReward, ErrorPolicy, guard
from toolkit.train.rewards.worker_process import WorkerProcess
from toolkit.train.rewards.worker_rewards import RemoteReward

HOSTILE = Path(__file__).with_name("hostile_rewards.py")
COMPLETIONS = ["a", "bad", "c"]
LIMIT_S = 0.4


def load(folder: Path, *names: str, **section: Any) -> list[Any]:
    """Load the functions with these names from hostile_rewards.py, in one worker."""
    (folder / "hostile.py").write_text(HOSTILE.read_text())
    config = RunConfig(
        model=ModelSection(model_name="m"),
        reward=RewardSection(
            functions=tuple(RewardFunction(name=f"hostile:{name}") for name in names), **section
        ),
        grpo={"seed": 3},
        runtime=RuntimeSection(allow_code=("hostile",)),
        source=str(folder / "run.yaml"),
    )
    return load_rewards(config, folder / "out").functions


def score(reward: Any, completions: list[Any] = COMPLETIONS, **columns: Any) -> list[Any]:
    called = reward(prompts=["p"] * len(completions), completions=completions, **columns)
    found: list[Any] = asyncio.run(called) if isinstance(reward, AsyncGuardedReward) else called
    return found


@pytest.fixture(autouse=True)
def _leave_no_finders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield
    sys.modules.pop("hostile", None)


@pytest.mark.parametrize("kind", ["missing", "not executable", "folder"])
def test_an_interpreter_that_cannot_be_started(kind: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    if kind == "not executable":
        python.touch()
    elif kind == "folder":
        python.mkdir()
    open_files = set(os.listdir("/proc/self/fd"))
    worker = WorkerProcess(str(python))
    with pytest.raises(ConfigError, match="cannot be started: ") as refused:
        worker.load({"do": "load"})
    assert (refused.value.where, refused.value.exit_code) == ("environment.python", 1)
    assert set(os.listdir("/proc/self/fd")) == open_files


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All functions in one worker, with on_error: none. Later calls work after each of them."""
    folder = tmp_path_factory.mktemp("worker")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(RemoteReward, "reply_grace_s", 0.5)
    names = [
        line.split("(")[0].split()[-1]
        for line in HOSTILE.read_text().splitlines()
        if line.startswith(("def ", "async def ")) and not line.split("def ")[1].startswith("_")
    ]
    loaded = load(folder, *names, on_error="none", timeout_s=LIMIT_S)
    yield {"folder": folder, **dict(zip(names, loaded, strict=True))}
    monkeypatch.undo()


def problem(rewards: dict[str, Any]) -> str:
    return (rewards["folder"] / "out" / "bad_rewards.jsonl").read_text().splitlines()[-1]


RAISES_OR_RETURNS = [
    ("cancelled", "raised CancelledError"),
    ("panic", "raised PanicException: called `Option::unwrap()`"),
    ("group", "raised BaseExceptionGroup: g (1 sub-exception)"),
    ("leaves", "raised SystemExit: 3"),
    ("async_leaves", "raised SystemExit: 3"),
    ("async_cancelled", "raised CancelledError"),
    ("bad_repr", "returned a BadRepr as a reward"),
    (
        "bad_float",
        "returned a BadFloat that cannot be read as a number: RuntimeError: no float",
    ),
    ("bad_length", "returned a Sized, not a list of rewards"),
    ("spoofs", "raised Spoofs: [U+001B][2J[U+D800][U+202E]\\\\nerror: another"),
    ("bad_message", "raised BadMessage: (its __str__ raises)"),
]
IN_THE_WORKER = [
    ("logs_a_text", "raised TypeError: log_metric needs a number, not a str"),
    ("interrupts", "raised KeyboardInterrupt"),
    ("kills_its_parent", "ended its process by SIGKILL"),
    ("closes_pipes", "ended its process with exit code 1"),
    ("dies", "ended its process with exit code 7"),
    ("crashes", "ended its process by SIGSEGV"),
]


@pytest.mark.parametrize(("name", "message"), RAISES_OR_RETURNS + IN_THE_WORKER)
def test_a_failing_sample_is_scored_none(rewards, name: str, message: str) -> None:
    assert score(rewards[name], log_metric=lambda *_: None) == [0.5, None, 0.5]
    assert message in problem(rewards)


@pytest.mark.parametrize(("name", "message"), RAISES_OR_RETURNS)
def test_a_failing_sample_is_scored_none_in_the_training_process(
    tmp_path: Path, name: str, message: str
) -> None:
    (reward,) = load(tmp_path, name, on_error="none", timeout_s=20.0, isolate=False)
    assert score(reward, log_metric=lambda *_: None) == [0.5, None, 0.5]
    assert message in problem({"folder": tmp_path})


@pytest.mark.parametrize("name", ["catches_all", "native", "own_alarm", "async_blocks"])
def test_a_call_that_cannot_be_interrupted_is_killed(rewards, name: str) -> None:
    begin = time.monotonic()
    assert score(rewards[name]) == [0.5, None, 0.5]
    assert "took longer than 0.4 s" in problem(rewards)
    assert time.monotonic() - begin < 30
    assert score(rewards["fine"]) == [1.0, 3.0, 1.0]


def test_a_forked_child_that_returns_does_not_reply(rewards) -> None:
    for _ in range(3):
        assert score(rewards["forks"]) == [1.0, 1.0, 1.0]
        assert score(rewards["fine"]) == [1.0, 3.0, 1.0]


def test_meta_tensors_and_sparse_tensors(tmp_path: Path) -> None:
    batch = {"prompts": ["p"] * 3, "completions": COMPLETIONS}
    for function, expected in (
        (lambda **_: torch.zeros(3, device="meta"), [None] * 3),
        (lambda **_: torch.tensor([0.0, 2.0, 0.0]).to_sparse(), [0.0, 2.0, 0.0]),
        (lambda **_: [torch.tensor(1.0, device="meta")] * 3, [None] * 3),
    ):
        reward = guard("mine", function, ErrorPolicy("none", None, tmp_path / "bad_rewards.jsonl"))
        assert reward(**batch) == expected
    saved = (tmp_path / "bad_rewards.jsonl").read_text()
    assert "returned a Tensor whose values cannot be read" in saved
    assert "returned a Tensor as a reward" in saved or "cannot be read as a number" in saved


def test_long_texts_are_shortened(rewards) -> None:
    size = len((rewards["folder"] / "out" / "bad_rewards.jsonl").read_bytes())
    logged: dict[str, Any] = {}
    score(rewards["long"], ["bad", "x" * 3_000_000], log_extra=logged.__setitem__)
    after = len((rewards["folder"] / "out" / "bad_rewards.jsonl").read_bytes())
    assert after - size < 100_000
    assert [len(text) < 11_000 for text in logged["column"]] == [True, True]


def test_a_reward_can_use_alarms_and_leave_one_set(rewards) -> None:
    assert score(rewards["uses_alarm"]) == [1.0, 1.0, 1.0]
    assert score(rewards["leaves_alarm"]) == [1.0, 1.0, 1.0]
    time.sleep(1.2)
    assert score(rewards["fine"]) == [1.0, 3.0, 1.0]


def test_a_reward_does_not_change_the_training_process(rewards, monkeypatch) -> None:
    umask, folder, environ = os.umask(0o027), Path.cwd(), dict(os.environ)
    try:
        assert score(rewards["changes_the_process"]) == [1.0, 1.0, 1.0]
        assert os.umask(0o027) == 0o027
        assert Path.cwd() == folder
        assert dict(os.environ) == environ
    finally:
        os.umask(umask)


def test_chats_changed_in_place_are_unchanged_for_the_next_reward(tmp_path: Path) -> None:
    chat = [{"role": "assistant", "content": "hi"}]
    for isolate in (True, False):
        (reward,) = load(tmp_path, "rewrites", isolate=isolate)
        prompts, completions = [[dict(chat[0])]], [[dict(chat[0])]]
        assert reward(prompts=prompts, completions=completions, tags=[["a"]]) == [1.0]
        assert (prompts, completions) == ([chat], [chat])


def test_dataset_values_and_trainer_state_reach_the_worker(rewards) -> None:
    import datetime
    from decimal import Decimal

    logged: dict[str, float] = {}
    state = TrainerState(global_step=5, epoch=0.5)
    columns = {
        "when": [
            datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
            datetime.date(2026, 1, 2),
        ],
        "raw": [b"\0\xff", Decimal("1.10")],
        "odd": ["\ud800", float("nan")],
        "nested": [{"a": [1, 2.5, None]}, {"\0toolkit": "bytes"}],
    }
    seen = score(
        rewards["shows"], ["a", "b"], trainer_state=state, log_metric=logged.__setitem__, **columns
    )
    assert seen == [5.0, 5.0]
    assert logged == {"same": 1.0, "rewards/shows/failed": 0.0}


def test_a_column_that_cannot_be_sent_is_named(tmp_path: Path) -> None:
    (reward,) = load(tmp_path, "fine")
    with pytest.raises(ConfigError, match=r"column picture has a value[\s\S]*isolate: false"):
        score(reward, picture=[object()] * 3)


def test_random_numbers_depend_on_the_seed_and_the_completions(tmp_path: Path) -> None:
    (one,) = load(tmp_path, "draws")
    drawn = score(one)
    assert score(one, ["other", "x", "y"]) != drawn
    assert score(one) == drawn
    (fresh,) = load(tmp_path, "draws")
    assert score(fresh) == drawn


def test_async_rewards_run_at_the_same_time(tmp_path: Path) -> None:
    (naps,) = load(tmp_path, "async_naps")

    async def at_once() -> list[Any]:
        return await asyncio.gather(*(naps(["p"], ["bad"]) for _ in range(4)))

    begin = time.monotonic()
    assert asyncio.run(at_once()) == [[1.0]] * 4
    assert time.monotonic() - begin < 3.9


def test_a_call_is_repeated_if_the_worker_was_killed_for_another_call(tmp_path: Path) -> None:
    (naps,) = load(tmp_path, "async_naps")
    threading.Timer(0.3, naps.function._worker.close).start()
    assert score(naps) == [1.0, 1.0, 1.0]


def test_a_signal_to_the_run_ends_the_wait_for_a_reward(tmp_path: Path) -> None:
    (reward,) = load(tmp_path, "catches_all", timeout_s=60.0)
    signals = StopSignals(grace_s=0.2)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    begin = time.monotonic()
    with signals.installed(), signals.stop_at_step_end(), pytest.raises(StepAbandoned):
        score(reward)
    assert time.monotonic() - begin < 20
    assert signals.received == "SIGTERM"


RUN = """
import sys, threading, time
from pathlib import Path
from toolkit.config.run_config import *
from toolkit.train.rewards import load_rewards
folder = Path(sys.argv[1])
config = RunConfig(
    model=ModelSection(model_name="m"),
    reward=RewardSection(functions=(RewardFunction(name="hostile:starts_a_process_and_hangs"),)),
    runtime=RuntimeSection(allow_code=("hostile",)),
    source=str(folder / "run.yaml"),
)
(reward,), _ = load_rewards(config, folder)
threading.Thread(target=reward, args=(["p"], [str(folder)]), daemon=True).start()
while len(list(folder.glob("pid-*"))) < 2:
    time.sleep(0.05)
print("ready", flush=True)
time.sleep(120)
"""


def test_no_process_is_left_when_the_run_is_killed(tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE.read_text())
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        left = [int(path.name.partition("-")[2]) for path in tmp_path.glob("pid-*")]
        assert all(_is_alive(pid) for pid in left)
        run.kill()
        run.wait()
        deadline = time.monotonic() + 20
        while any(_is_alive(pid) for pid in left) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(_is_alive(pid) for pid in left)


def test_no_process_is_left_when_a_run_between_two_calls_is_killed(tmp_path: Path) -> None:
    (tmp_path / "hostile.py").write_text(HOSTILE.read_text())
    text = RUN.replace("starts_a_process_and_hangs", "starts_a_process")
    command = [sys.executable, "-c", text, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        time.sleep(0.2)  # the call has returned
        left = [int(path.name.partition("-")[2]) for path in tmp_path.glob("pid-*")]
        assert len(left) == 2
        run.kill()
        run.wait()
        deadline = time.monotonic() + 20
        while any(_is_alive(pid) for pid in left) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(_is_alive(pid) for pid in left)


def _is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_worker_ends_with_its_rewards(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("AT_EXIT", str(tmp_path / "at-exit"))
    (reward,) = load(tmp_path, "says_pid")
    (pid, *_) = (int(value) for value in score(reward))
    assert _is_alive(pid)
    del reward
    deadline = time.monotonic() + 20
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(pid)
    assert (tmp_path / "at-exit").exists()


def test_a_completion_on_which_math_verify_hangs_scores_0(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    wanted = RewardFunction(name="math_verify", options={"seconds_each": 1.0})
    config = RunConfig(
        model=ModelSection(model_name="m"), reward=RewardSection(functions=(wanted,))
    )
    (reward,) = load_rewards(config, tmp_path).functions
    begin = time.monotonic()
    hostile = r"\boxed{9^{9^{9^{9^{9}}}}}"
    assert score(reward, [r"\boxed{5}", hostile, r"\boxed{5}"], answer=["5"] * 3) == [1.0, 0.0, 1.0]
    assert time.monotonic() - begin < 30


def test_many_calls_leak_no_handles_and_no_memory(rewards) -> None:
    (pid, *_) = (int(value) for value in score(rewards["says_pid"]))

    def open_handles() -> tuple[int, ...]:
        score(rewards["fine"], ["word " * 200] * 16)
        folders = (f"/proc/{pid}/fd", f"/proc/{pid}/task", "/proc/self/fd")
        return tuple(len(os.listdir(folder)) for folder in folders)

    def resident() -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])

    for _ in range(100):
        before = open_handles()
    pages = resident()
    for _ in range(400):
        score(rewards["fine"], ["word " * 200] * 16)
    assert all(now <= then for now, then in zip(open_handles(), before, strict=True))
    assert resident() <= pages * 1.05


def test_a_call_costs_little(rewards) -> None:
    ids = [list(range(100_000, 100_512)) for _ in range(64)]
    texts = ["word " * 512] * 64
    score(rewards["fine"], texts, completion_ids=ids)
    begin = time.perf_counter()
    for _ in range(5):
        score(rewards["fine"], texts, completion_ids=ids)
    assert (time.perf_counter() - begin) / 5 < 0.5

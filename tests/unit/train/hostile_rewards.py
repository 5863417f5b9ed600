"""Reward functions that misbehave. Those that call ``_each`` misbehave only for the completion
"bad".
"""

import asyncio
import atexit
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time

if "AT_EXIT" in os.environ:
    atexit.register(lambda: open(os.environ["AT_EXIT"], "w").close())


def _each(completions, bad):
    return [bad() if text == "bad" else 0.5 for text in completions]


def fine(completions, **kwargs):
    return [float(len(text)) for text in completions]


def _raise(error):
    raise error


class PanicException(BaseException):
    pass


def cancelled(completions, **kwargs):
    return _each(completions, lambda: _raise(asyncio.CancelledError()))


def panic(completions, **kwargs):
    text = "called `Option::unwrap()` on a `None` value"
    return _each(completions, lambda: _raise(PanicException(text)))


def group(completions, **kwargs):
    error = BaseExceptionGroup("g", [asyncio.CancelledError()])
    return _each(completions, lambda: _raise(error))


def interrupts(completions, **kwargs):
    return _each(completions, lambda: _raise(KeyboardInterrupt()))


def leaves(completions, **kwargs):
    return _each(completions, lambda: sys.exit(3))


async def async_leaves(completions, **kwargs):
    return _each(completions, lambda: sys.exit(3))


async def async_cancelled(completions, **kwargs):
    return _each(completions, lambda: _raise(asyncio.CancelledError()))


class BadRepr:
    def __repr__(self):
        raise RuntimeError("no repr")


def bad_repr(completions, **kwargs):
    return _each(completions, BadRepr)


class BadFloat(float):
    def __float__(self):
        raise RuntimeError("no float")


def bad_float(completions, **kwargs):
    return _each(completions, lambda: BadFloat(1.0))


class Sized:
    def __len__(self):
        raise RuntimeError("no length")


def bad_length(completions, **kwargs):
    return Sized() if "bad" in completions else _each(completions, Sized)


class BadMessage(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def bad_message(completions, **kwargs):
    return _each(completions, lambda: _raise(BadMessage()))


def logs_a_text(completions, log_metric, **kwargs):
    return _each(completions, lambda: log_metric("name", "text"))


def _end_parent():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def kills_its_parent(completions, **kwargs):
    return _each(completions, _end_parent)


def closes_pipes(completions, **kwargs):
    return _each(completions, lambda: os.closerange(3, 64))


def forks(completions, **kwargs):
    child = os.fork()
    if child:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    return [1.0] * len(completions)


def dies(completions, **kwargs):
    return _each(completions, lambda: os._exit(7))


def crashes(completions, **kwargs):
    return _each(completions, lambda: os.kill(os.getpid(), signal.SIGSEGV))


def _catch():
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(0.05)


def catches_all(completions, **kwargs):
    return _each(completions, _catch)


def _native():
    return sum(itertools.repeat(1, 10**13))


def native(completions, **kwargs):
    """Run native code that keeps the interpreter lock."""
    return _each(completions, _native)


def _math_verifys_way(seconds):
    def handler(number, frame):
        raise TimeoutError

    old = signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, handler)
    signal.alarm(1)
    try:
        time.sleep(seconds)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def own_alarm(completions, **kwargs):
    """Cancel the alarm of the time limit, and then hang."""

    def hang():
        _math_verifys_way(0)
        while True:
            time.sleep(0.05)

    return _each(completions, hang)


def uses_alarm(completions, **kwargs):
    _math_verifys_way(0.01)
    return [1.0] * len(completions)


def leaves_alarm(completions, **kwargs):
    signal.alarm(1)
    return [1.0] * len(completions)


async def async_blocks(completions, **kwargs):
    return _each(completions, _native)


async def async_naps(completions, **kwargs):
    await asyncio.sleep(1.0)
    return [1.0] * len(completions)


def long(completions, log_extra, **kwargs):
    log_extra("column", ["y" * 5_000_000] * len(completions))
    raise ValueError("x" * 5_000_000)


def changes_the_process(completions, **kwargs):
    os.umask(0)
    os.chdir("/")
    os.environ["PATH"] = ""
    return [1.0] * len(completions)


def rewrites(prompts, completions, tags, **kwargs):
    prompts[0][0]["content"] = completions[0][0]["content"] = "spoiled"
    completions[0].append({"role": "tool"})
    tags[0].clear()
    return [1.0]


def shows(completions, when, raw, odd, nested, trainer_state, log_metric, **kwargs):
    import datetime
    from decimal import Decimal

    same = (
        when
        == [datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC), datetime.date(2026, 1, 2)]
        and raw == [b"\0\xff", Decimal("1.10")]
        and odd[0] == "\ud800"
        and odd[1] != odd[1]
        and nested == [{"a": [1, 2.5, None]}, {"\0toolkit": "bytes"}]
        and trainer_state.epoch == 0.5
    )
    log_metric("same", same)
    return [float(trainer_state.global_step)] * len(completions)


def draws(completions, **kwargs):
    import numpy

    return [random.random() + numpy.random.rand() for _ in completions]


def says_pid(completions, **kwargs):
    return [float(os.getpid())] * len(completions)


def starts_a_process(completions, **kwargs):
    started = subprocess.Popen(["sleep", "60"])
    for pid in (os.getpid(), started.pid):
        open(f"{completions[0]}/pid-{pid}", "w").close()
    return [1.0] * len(completions)


def starts_a_process_and_hangs(completions, **kwargs):
    starts_a_process(completions)
    _catch()


class Spoofs(Exception):
    def __str__(self):
        return "\x1b[2J\ud800\u202e\nerror: another"


def spoofs(completions, **kwargs):
    return _each(completions, lambda: _raise(Spoofs()))

"""An OpenEnv environment for the tests. The model guesses a number that the seed determines."""

from __future__ import annotations

import random
import time
from contextlib import suppress

from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
    """Guess the number."""

    number: int


class Seen(Observation):
    text: str = ""


class Game(Environment[Guess, Seen, State]):
    def __init__(self, most: int = 9, fault: str = "") -> None:
        super().__init__()
        self.most, self.fault = most, fault
        self.secret = self.tries = 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **more) -> Seen:
        self.secret, self.tries = random.Random(seed).randint(1, self.most), 0
        noise = f" {time.time_ns()}" if self.fault == "changes" else ""
        return Seen(text=f"Guess a number from 1 to {self.most}.{noise}")

    def step(self, action: Guess, timeout_s: float | None = None, **more) -> Seen:
        self.tries += 1
        if self.fault == "raises":
            raise RuntimeError("the board is broken")
        if self.fault == "hangs" and self.tries == 2:
            while True:
                with suppress(BaseException):  # also the exception of the time limit
                    time.sleep(600)
        if self.fault == "nonsense":
            return Seen(text="odd", reward=float("nan"))
        if action.number == self.secret:
            return Seen(text="right", reward=1.0, done=True)
        low = action.number < self.secret
        return Seen(text="higher" if low else "lower", reward=-0.1)

    @property
    def state(self) -> State:
        return State(step_count=self.tries)


class Untyped(Game):
    def step(self, action, timeout_s=None, **more):
        return Seen(text="?")

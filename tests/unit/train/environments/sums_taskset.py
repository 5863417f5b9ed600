"""A taskset of verifiers 0.4 for the tests. It has sums, and kinds of tasks that the toolkit does
not support.
"""

from __future__ import annotations

import time
from collections.abc import Iterable  # noqa: TC003 - verifiers reads the annotations

import verifiers.v1 as vf


class Sum(vf.TaskData):
    answer: str


class SumTask(vf.Task[Sum]):
    @vf.reward(weight=2.0)
    async def exact(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def digit(self, trace: vf.Trace) -> float:
        return float(trace.last_reply.isdigit())


class Container(SumTask):
    NEEDS_CONTAINER = True


class Sandboxed(SumTask):
    @vf.reward
    async def sandboxed(self, trace: vf.Trace, runtime: vf.Runtime) -> float:
        return 0.0


class NoReward(vf.Task[Sum]):
    pass


class Calculator(vf.Toolset):
    pass


class Tools(SumTask):
    @classmethod
    def toolsets(cls, config):
        return [Calculator]


class SumsConfig(vf.TasksetConfig):
    most: int = 5
    kind: str = "sums"


KINDS = {"container": Container, "sandbox": Sandboxed, "no_reward": NoReward, "tools": Tools}


class Sums(vf.Taskset[SumTask, SumsConfig]):
    def load(self) -> Iterable[SumTask]:
        kind = self.config.kind
        if kind == "raises":
            raise RuntimeError("no tasks today")
        if kind == "hangs":
            time.sleep(600)
        for number in range(self.config.most):
            prompt = None if kind == "no_prompt" else f"{number}+1="
            data = Sum(prompt=prompt, answer=str(number + 1))
            yield KINDS.get(kind, SumTask)(data, self.config.task)


__all__ = ["Sums"]

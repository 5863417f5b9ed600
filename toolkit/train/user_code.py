"""Load the parts of a run that the user provides: data, rewards, tools and an environment. They are
loaded before the engine starts.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from toolkit.base.errors import ConfigError
from toolkit.config import parallel
from toolkit.sizing.workload import max_prompt_length
from toolkit.train.checkpointing import micro_batch_record
from toolkit.train.data.dataset import load_data
from toolkit.train.process_control import world_size
from toolkit.train.rewards import load_rewards
from toolkit.train.rewards.environment_code import environment_code_of
from toolkit.train.rewards.environment_problems import request_problems
from toolkit.train.rewards.openenv import OpenEnv
from toolkit.train.rewards.worker_process import Workers
from toolkit.train.rollout.tools import EpisodeHost, load_tools

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from toolkit.config.run_config import RunConfig
    from toolkit.train.data.dataset import Data
    from toolkit.train.rewards import Rewards
    from toolkit.train.rollout.tools import Tool


class UserCode(NamedTuple):
    """The user's data, rewards, tools and environment. If rollouts have several steps in an
    environment, ``episodes`` creates the environments. Otherwise, ``episodes`` is None.
    """

    data: Data
    rewards: Rewards
    tools: list[Tool]
    episodes: EpisodeHost | None

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each split of the data."""
        reports = {"train": self.data.report.train, "eval": self.data.report.eval}
        return {n: r.digest.removeprefix("sha256:") for n, r in reports.items() if r is not None}


def load_user_code(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, run_dir: Path
) -> UserCode:
    """Load data, rewards, tools and environment, each in the process that the run file selects.

    Raises:
        ToolkitError: a part is missing, is not allowed, or fails to load.
    """
    code, timeout_s, environment = (
        environment_code_of(config),
        config.reward.timeout_s,
        config.environment,
    )
    workers = Workers.create(environment.python if environment else None)
    is_separate = config.reward.isolate or workers.environment is not workers.rewards
    is_multi_step = code is not None and code.adapter == OpenEnv.name
    environment_worker = workers.environment if is_separate or is_multi_step else None
    data = load_data(
        config.dataset,
        tokenizer,
        max_prompt_length=max_prompt_length(config),
        count_all=config.grpo.get("max_prompt_length") is not None,
        template=config.grpo.get("chat_template_kwargs"),
        environment=environment,
        make_problems=code and partial(request_problems, code, environment_worker, timeout_s),
    )
    replicas = parallel.count_replicas(world_size(), config.model.tensor_parallel_size)
    micro_batch_record.check_prompt_count(config, len(data.train), replicas)
    rewards = load_rewards(config, run_dir, columns=data.train.column_names, workers=workers)
    tools = load_tools(config, workers.rewards if config.reward.isolate else None)
    episodes = None
    if code is not None and is_multi_step:
        episodes = EpisodeHost(code, workers.environment, timeout_s)
    if (tools or episodes) and not data.report.train.chat:
        raise ConfigError(
            "tools need prompts in a chat format, but the prompts are plain text",
            where="dataset.chat",
            fix="use a model with a chat template, or remove the section "
            + ("tools" if tools else "environment"),
        )
    return UserCode(data, rewards, tools, episodes)

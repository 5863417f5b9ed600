"""Describe the code of an environment, and check that the run file allows this code to be run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.base.errors import ConfigError
from toolkit.config.build_config import thaw
from toolkit.config.code import is_allowed
from toolkit.config.environments import ADAPTERS, task_module
from toolkit.train.rewards.user_reward import make_importable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from toolkit.config.run_config import RunConfig


class EnvironmentCode(NamedTuple):
    """The source of an environment: its library (``adapter``), task and options.

    ``allow_code`` lists the modules that the run file allows. ``folder`` is the folder of the run
    file.
    """

    adapter: str
    task: str
    options: dict[str, Any]
    allow_code: tuple[str, ...]
    folder: Path

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> EnvironmentCode:
        """Create an EnvironmentCode from the JSON values that ``to_request`` returned."""
        adapter, task, options = request["adapter"], request["task"], request["options"]
        folder = Path(request["folder"])
        return cls(adapter, task, options, tuple(request["allow_code"]), folder)

    def to_request(self) -> dict[str, Any]:
        """Return the fields of this object as JSON values, to send them to the worker process."""
        values = self._asdict() | {"allow_code": list(self.allow_code), "folder": str(self.folder)}
        return {**values, "options": thaw(self.options)}

    def make_module_importable(self) -> None:
        """Make the module of the environment importable from the folder of the run file.

        Raises:
            ConfigError: runtime.allow_code does not list the module, so it must not be imported.
        """
        check_package_allowed(self.adapter, self.allow_code)
        module = task_module(self.adapter, self.task)
        if module is None:
            return
        if not is_allowed(module, self.allow_code):
            raise ConfigError(
                f"environment.task {self.task} runs code of the module {module}, which "
                "runtime.allow_code does not list",
                where="environment.task",
                fix=f"if you trust the module, add {module.partition('.')[0]} to "
                "runtime.allow_code",
            )
        make_importable(self.folder, self.allow_code)


def environment_code_of(config: RunConfig) -> EnvironmentCode | None:
    """The EnvironmentCode of the run. None if the run has no environment."""
    section = config.environment
    if section is None:
        return None
    folder = Path(config.source).resolve().parent if config.source else Path.cwd()
    options = thaw(section.options)
    allowed = tuple(config.runtime.allow_code)
    return EnvironmentCode(section.adapter, section.task, options, allowed, folder)


def check_package_allowed(adapter: str, allow_code: Sequence[str]) -> None:
    """Raise ConfigError if ``allow_code`` does not list the package of the environment library
    ``adapter``.
    """
    module = ADAPTERS[adapter].modules[0]
    if not is_allowed(module, allow_code):
        raise ConfigError(
            f"the environment {adapter} runs code of the module {module}, which runtime.allow_code "
            "does not list",
            fix="if you trust the module, add it to runtime.allow_code, for example "
            f"`runtime.allow_code: [{module}]`",
        )

"""config/trl_names records the values that the installed transformers, accelerate and torch
accept.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from functools import cache
from typing import TYPE_CHECKING

import pytest

from toolkit.config.environment_tasks import task_names
from toolkit.config.libraries import package_folder
from toolkit.config.trl_names import (
    ACCELERATOR_KEYS,
    BATCHING_KEYS,
    CACHE_IMPLEMENTATIONS,
    COMPILE_BACKENDS,
    COMPILE_MODES,
    DEBUG_OPTIONS,
    OPTIMIZERS,
    PASSED_BY_THE_TRAINER,
    ROUTER_LOGIT_TYPES,
    SCHEDULE_CHOICES,
    SCHEDULES,
    TARGETED_OPTIMIZERS,
    TRACKERS,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.contract


def installed_folder(package: str) -> Path:
    path = package_folder(package)
    assert path is not None
    return path


def test_the_schedules_are_those_of_transformers() -> None:
    from transformers import SchedulerType

    assert set(SCHEDULES) == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize("schedule_name", sorted(SCHEDULES))
def test_a_schedule_has_the_keywords_of_its_function(schedule_name: str) -> None:
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    metric_schedules = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
    function = metric_schedules.get(schedule_name) or TYPE_TO_SCHEDULER_FUNCTION[schedule_name]
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", *PASSED_BY_THE_TRAINER)
    }
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    assert set(SCHEDULES[schedule_name].keywords) == set(parameters)
    assert set(SCHEDULES[schedule_name].required) == needed


def test_schedules_that_ignore_keywords() -> None:
    """``constant`` and ``constant_with_warmup`` return before they read the keywords."""
    import torch
    from transformers import get_scheduler

    for schedule_name, schedule in SCHEDULES.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        unknown_keyword = {"no_such_keyword": 1}
        if schedule.reads_kwargs:
            with pytest.raises(TypeError, match="no_such_keyword"):
                get_scheduler(schedule_name, optimizer, 1, 10, unknown_keyword)
        else:
            get_scheduler(schedule_name, optimizer, 1, 10, unknown_keyword)


def test_schedules_accept_only_the_recorded_choices() -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for name, choices in SCHEDULE_CHOICES.items():
        schedule_name = "warmup_stable_decay" if name.endswith("_type") else "greedy"
        required = {"num_decay_steps": 1} if schedule_name == "warmup_stable_decay" else {}
        for choice in choices:
            get_scheduler(schedule_name, optimizer, 1, 10, {**required, name: choice})
        with pytest.raises(ValueError, match=r"(?i)unknown"):
            get_scheduler(schedule_name, optimizer, 1, 10, {**required, name: "other"})


@cache
def optimizer_handlers() -> dict[str, ast.FunctionDef]:
    """The functions of transformers' trainer_optimizer.py, by name."""
    path = installed_folder("transformers") / "trainer_optimizer.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def option_names(function: ast.AST) -> set[str]:
    """The names of the options that a handler reads from ``ctx.optim_args``: with get and pop, with
    ``in``, and in a loop over names.
    """
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and "optim_args." in ast.unparse(node.func):
            names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
        if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith(
            "optim_args"
        ):
            names |= {node.left.value} if isinstance(node.left, ast.Constant) else set()
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            names |= {item.value for item in node.iter.elts if isinstance(item, ast.Constant)}
    return names


def test_an_optimizer_reads_the_options_that_its_handler_reads() -> None:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS

    recorded_options: dict[str, set[str]] = {}
    for optimizer, handler in _OPTIMIZER_HANDLERS.items():
        recorded_options.setdefault(handler.__name__, set()).update(
            OPTIMIZERS[optimizer.value].options
        )
    assert {optimizer.value for optimizer in _OPTIMIZER_HANDLERS} == set(OPTIMIZERS)
    assert recorded_options == {
        name: option_names(optimizer_handlers()[name]) for name in recorded_options
    }


def test_the_optimizers_with_targets_are_the_low_rank_ones() -> None:
    with_targets = {
        name
        for name, node in optimizer_handlers().items()
        if "_setup_low_rank_optimizer(" in ast.unparse(node)
    } - {"_setup_low_rank_optimizer"}
    assert with_targets == {f"_get_{family}_optimizer" for family in TARGETED_OPTIMIZERS}


def test_the_packages_are_those_that_transformers_imports() -> None:
    text = (installed_folder("transformers") / "trainer_optimizer.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^ +from (\w+)[\w.]* import", text, re.MULTILINE))
    modules = {
        module
        for optimizer in OPTIMIZERS.values()
        if optimizer.package is not None
        for module in optimizer.package.modules
    }
    assert modules == imported - {"torch"}


def test_the_trackers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_a_tracker_has_the_modules_that_transformers_looks_for() -> None:
    text = (installed_folder("transformers") / "integrations" / "integration_utils.py").read_text(
        "utf-8"
    )
    for name, package in TRACKERS.items():
        for module in package.modules if package is not None else ():
            assert re.search(rf'["\' ]{module}\b', text), f"{name}: {module} is not looked for"


def test_the_keys_of_accelerator_config() -> None:
    from transformers.trainer_pt_utils import AcceleratorConfig

    assert set(ACCELERATOR_KEYS) == {field.name for field in dataclasses.fields(AcceleratorConfig)}


def test_the_options_of_debug() -> None:
    from transformers.debug_utils import DebugOption

    assert set(DEBUG_OPTIONS) == {option.value for option in DebugOption}


def test_the_compilers_and_their_modes() -> None:
    import torch
    from accelerate.utils import DynamoBackend

    assert set(COMPILE_BACKENDS) == {backend.value.lower() for backend in DynamoBackend} - {"no"}
    assert {"default", *torch._inductor.list_mode_options()} == set(COMPILE_MODES)


def test_the_caches_of_generation() -> None:
    from transformers.generation.configuration_utils import (
        DYNAMIC_CACHE_IMPLEMENTATIONS,
        STATIC_CACHE_IMPLEMENTATIONS,
    )

    assert set(CACHE_IMPLEMENTATIONS) == {
        *DYNAMIC_CACHE_IMPLEMENTATIONS,
        *STATIC_CACHE_IMPLEMENTATIONS,
    }


def test_the_keys_of_continuous_batching() -> None:
    from transformers.generation import ContinuousBatchingConfig

    fields = dataclasses.fields(ContinuousBatchingConfig)
    assert set(BATCHING_KEYS) == {field.name for field in fields if field.init}


def test_the_families_that_return_router_logits() -> None:
    families_found = set()
    for path in (installed_folder("transformers") / "models").glob("*/configuration_*.py"):
        text = path.read_text(encoding="utf-8")
        if "output_router_logits" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                families_found |= model_types(node)
    assert families_found == ROUTER_LOGIT_TYPES


def model_types(config_class: ast.ClassDef) -> set[str]:
    """The model_type of a config class that has output_router_logits."""
    values = {
        target.id: statement.value
        for statement in config_class.body
        if isinstance(statement, (ast.Assign, ast.AnnAssign))
        for target in (
            statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        )
        if isinstance(target, ast.Name)
    }
    name = values.get("model_type")
    if "output_router_logits" not in values or not isinstance(name, ast.Constant):
        return set()
    return {str(name.value)}


def test_the_tasks_of_reasoning_gym_are_read_from_its_source() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    assert task_names() == set(reasoning_gym.factory.DATASETS)

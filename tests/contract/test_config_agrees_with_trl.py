"""TRL's GRPOConfig accepts every grpo section that the validator accepts. If TRL refuses a section,
a rule refuses it.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.config import find_schema
from toolkit.config.document_loader import assemble
from toolkit.config.finding import Severity
from toolkit.config.rules import Situation
from toolkit.config.source import Source
from toolkit.config.validate import validate

if TYPE_CHECKING:
    from pathlib import Path

    from toolkit.config.run_config import RunConfig

pytestmark = pytest.mark.contract
GRPO: dict[str, dict[str, Any]] = {
    name: schema
    for name, schema in find_schema("run")["properties"]["grpo"]["properties"].items()
    if "x-refused" not in schema
}
# Keys whose values need a package, a service or a kernel that this machine may not have.
MACHINE_DEPENDENT = {
    "report_to", "debug", "tf32", "torch_compile_backend", "torch_compile_mode",
    "torch_compile", "optim", "ddp_backend", "accelerator_config", "use_liger_kernel",
    "reward_weights", "log_completions_hub_repo", "fp16_full_eval", "bf16_full_eval",
    "use_cpu",
}  # fmt: skip
TESTED_KEYS = sorted(set(GRPO) - MACHINE_DEPENDENT)


def example_values(name: str) -> st.SearchStrategy[Any]:
    """Legal values of a key, and values close to them."""
    schema = GRPO[name]
    candidates = [*schema.get("examples", ()), *schema.get("enum", ())]
    if isinstance(schema.get("default"), bool):
        candidates += [True, False]
    if schema.get("type") == "integer" or "integer" in schema.get("type", ()):
        candidates += [1, 2, 3, 4, 6, 8]
    return st.sampled_from(candidates)


def validate_grpo(grpo: dict[str, Any], folder: Path) -> tuple[RunConfig | None, list[str]]:
    """The config of a run with this grpo section, and the ids of the rules that refuse it."""
    run = {
        "model": {"model_name": "nobody/nothing"},
        "dataset": {"path": "a/b", "eval_split": "test"},
        "reward": {"functions": [{"name": "exact_match"}]},
        "grpo": grpo,
    }
    source = Source("run.json", json.dumps(run), folder, folder / "run.json", "json")
    document = assemble(source)
    validation = validate(document, Situation())
    errors = [finding.rule for finding in validation.findings if finding.severity is Severity.ERROR]
    return validation.config, errors


def build_trl_config(config: RunConfig, folder: Path) -> None:
    """The GRPOConfig that training creates, with the toolkit's own fields."""
    from toolkit.train.grpo_config import GRPOConfig
    from toolkit.train.trl_arguments import grpo_config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grpo = dict(config.grpo)
        if grpo.get("per_device_train_batch_size") == "auto":  # the sizer sets both keys
            grpo |= {
                "per_device_train_batch_size": grpo["generation_batch_size"],
                "gradient_accumulation_steps": 1,
            }
        config = replace(config, grpo=grpo)
        grpo_config(config, folder, GRPOConfig, has_eval=True)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_trl_accepts_every_valid_section(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    names = data.draw(st.lists(st.sampled_from(TESTED_KEYS), min_size=1, max_size=6, unique=True))
    grpo = {name: data.draw(example_values(name), label=name) for name in names}
    config, _ = validate_grpo(grpo, folder)
    if config is not None:
        build_trl_config(config, folder)


REFUSED_SETTINGS = {
    "GRPO001": {"num_generations": 3},
    "GRPO002": {"num_generations": 1},
    "GRPO003": {"generation_batch_size": 8, "steps_per_generation": 1},
    "GRPO004": {"generation_batch_size": 12, "num_generations": 4},
    "GRPO005": {"eval_strategy": "steps", "per_device_eval_batch_size": 3},
    "GRPO006": {"auto_find_batch_size": True},
    "GRPO008": {"vllm_importance_sampling_clip_min": 4.0},
    "GRPO009": {"vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": None},
    "GRPO010": {"log_completions_hub_repo": "me/x"},
    "GRPO023": {"bf16": True, "fp16": True},
    "GRPO024": {"load_best_model_at_end": True},
    "GRPO025": {"lr_scheduler_type": "greedy"},
    "GRPO026": {"dataloader_prefetch_factor": 2},
    "GRPO027": {"save_steps": 10.5},
}  # fmt: skip


def test_trl_accepts_an_auto_micro_batch(tmp_path: Path) -> None:
    grpo = {
        "per_device_train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "generation_batch_size": 24,
        "num_generations": 4,
    }
    config, errors = validate_grpo(grpo, tmp_path)
    assert config is not None, errors
    build_trl_config(config, tmp_path)


@pytest.mark.parametrize("rule", sorted(REFUSED_SETTINGS))
def test_a_section_that_trl_refuses_is_refused_by_a_rule(rule: str, tmp_path: Path) -> None:
    import trl

    grpo = REFUSED_SETTINGS[rule]
    assert validate_grpo(grpo, tmp_path)[1] == [rule]
    with pytest.raises(ValueError, match=r"."):
        trl.GRPOConfig(
            **{"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": [], **grpo}
        )

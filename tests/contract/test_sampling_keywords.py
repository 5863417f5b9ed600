"""The table of sampling keywords has every field of both engines, and no other."""

from __future__ import annotations

import ast
from dataclasses import fields

import pytest
from transformers import GenerationConfig
from trl import GRPOConfig

from toolkit.config.libraries import package_folder
from toolkit.config.sampling_keywords import KEYWORDS, Effect

pytestmark = pytest.mark.contract


def test_the_table_has_every_field_of_vllms_sampling_params() -> None:
    folder = package_folder("vllm")
    if folder is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((folder / "sampling_params.py").read_text(encoding="utf-8"))
    (params,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "SamplingParams"
    )
    field_names = {
        line.target.id
        for line in params.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    public = {name for name in field_names if not name.startswith("_")}
    assert len(public) > 20
    # vLLM 0.25.1 does not have all fields of 0.31.
    assert public <= set(KEYWORDS["vllm"]), "vLLM has a sampling keyword that is not in the table"
    newer = {"prompt_logprob_token_ids", "prompt_logprob_start", "watermarking"}
    assert set(KEYWORDS["vllm"]) - public <= newer


def test_the_table_has_every_field_of_generation_config() -> None:
    field_names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert field_names - {"transformers_version"} == set(KEYWORDS["transformers"])


def test_the_fields_with_the_meaning_of_a_keyword_are_trls() -> None:
    field_names = {field.name for field in fields(GRPOConfig)}
    for table in KEYWORDS.values():
        for keyword in table.values():
            assert keyword.field is None or keyword.field in field_names
            # train/rollout/sampler.sampled_distribution applies the keywords with REPRODUCED.
            assert keyword.effect is not Effect.REPRODUCED or (
                keyword.field is not None or keyword.name.endswith("_penalty")
            )

"""vLLM has every engine argument to which an option of the toolkit is passed."""

from __future__ import annotations

import dataclasses

import pytest

from toolkit.config.engine_settings import API_OPTIONS

pytestmark = pytest.mark.contract


def test_vllm_has_every_engine_argument() -> None:
    arguments = pytest.importorskip("vllm.engine.arg_utils").EngineArgs
    engine_arguments = {item.name for item in dataclasses.fields(arguments)}
    assert {
        option.vllm_argument for option in API_OPTIONS.values() if option.vllm_argument
    } <= engine_arguments

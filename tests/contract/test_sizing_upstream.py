"""The constants that the sizer copies from the sources of TRL and vLLM are those of the installed
versions.
"""

import pytest

from toolkit.config.libraries import LEGAL_RANKS
from toolkit.sizing.micro_batch import TRL_DEFAULTS
from toolkit.sizing.trainer_bytes import HEAD_COLUMNS, HEAD_TOKENS
from toolkit.sizing.weight_bytes import VOCABULARY_PADDING

pytestmark = pytest.mark.contract


def test_trl_defaults():
    from dataclasses import fields

    from trl import GRPOConfig

    defaults = {field.name: field.default for field in fields(GRPOConfig)}
    assert {name: defaults[name] for name in TRL_DEFAULTS} == TRL_DEFAULTS


def test_tiles_of_the_fused_head():
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert chunked_logprob.TOKEN_CHUNK_SIZE == HEAD_TOKENS
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == HEAD_COLUMNS


def test_trl_casts_adapters_of_quantized_models():
    import inspect

    import trl

    source = inspect.getsource(trl.GRPOTrainer.__init__)
    assert "param.data = param.data.to(torch.bfloat16)" in source
    assert "is_loaded_in_4bit" in source


@pytest.mark.engine
def test_vllm_numbers():
    from typing import get_args

    pytest.importorskip("vllm")
    from vllm.config.lora import MaxLoRARanks
    from vllm.model_executor.layers.vocab_parallel_embedding import DEFAULT_VOCAB_PADDING_SIZE

    assert get_args(MaxLoRARanks) == LEGAL_RANKS
    assert DEFAULT_VOCAB_PADDING_SIZE == VOCABULARY_PADDING

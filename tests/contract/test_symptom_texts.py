"""The texts that toolkit.base.symptoms searches for are in the source of the installed vLLM and
torch.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from toolkit.base.symptoms import find_symptoms

pytestmark = pytest.mark.contract

UPSTREAM_TEXTS = {
    "no-cache-blocks": ("vllm", "v1/core/kv_cache_utils.py", r"No available memory for the cache"),
    "sequence-does-not-fit": ("vllm", "v1/core/kv_cache_utils.py", r"To serve at least one req"),
    "free-below-request": ("vllm", "v1/worker/utils.py", r"Free memory on device"),
    "neighbour-moved": ("vllm", "v1/worker/gpu_worker.py", r"Error in memory profiling"),
    "sampler-warm-up": ("vllm", "v1/worker/gpu_model_runner.py", r"when warming up sampler with"),
    "lora-rank": ("vllm", "lora/peft_helper.py", r"is greater than max_lora_rank"),
    "no-kernel-image": ("torch", "cuda/__init__.py", r"is not compatible with the current PyTorch"),
}


@pytest.mark.parametrize("symptom", sorted(UPSTREAM_TEXTS))
def test_the_text_is_still_in_the_upstream_source(symptom: str) -> None:
    package, file, pattern = UPSTREAM_TEXTS[symptom]
    spec = find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None
    source = (Path(spec.origin).parent / file).read_text(encoding="utf-8")
    match_in_source = re.search(pattern, source)
    assert match_in_source, f"{package}/{file} no longer has the text {pattern!r}"
    # The printed message: adjacent literals are joined, and placeholders become numbers.
    excerpt = source[max(0, match_in_source.start() - 200) : match_in_source.start() + 600]
    printed = re.sub(r"\"\s*\n\s*f?\"", "", excerpt)
    printed = re.sub(r"\{[^{}]*\}", "32", printed)
    assert symptom in {rule.id for rule in find_symptoms(printed)}

"""The sizer and PEFT count the same trainable parameters of an adapter, for every architecture."""

import json
from pathlib import Path

import pytest

from toolkit.config.run_config import SEVEN_PROJECTIONS
from toolkit.sizing import lora_bytes
from toolkit.sizing.spec import spec_from_values

pytestmark = pytest.mark.contract
TINY = json.loads((Path(__file__).parents[1] / "fixtures" / "sizing" / "tiny.json").read_text())
COMMON = TINY.pop("common")
TARGETS = {
    "seven": SEVEN_PROJECTIONS,
    "two": ("q_proj", "v_proj"),
    "pattern": r".*self_attn\.(o_proj|k_proj)",
}


# PEFT itself doubles the rank for fused experts, and warns about it.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", sorted(TINY))
def test_adapter_parameters_are_those_of_peft(name, targets):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {**COMMON, **TINY[name]}
    target_modules = TARGETS[targets]
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    peft_targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    predicted = lora_bytes.adapter_parameters(
        spec_from_values(values, name=name), 8, target_modules
    )
    settings = LoraConfig(r=8, target_modules=peft_targets, task_type="CAUSAL_LM")
    if predicted == 0:  # the model has no such modules (Phi-3 has fused projections)
        with pytest.raises(ValueError, match="not found in the base model"):
            get_peft_model(model, settings, low_cpu_mem_usage=True)
        return
    model = get_peft_model(model, settings, low_cpu_mem_usage=True)
    trainable = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert predicted == trainable

"""Build a Hugging Face model without weights. Its parameters are on torch's meta device, which has
no memory. Its buffers are real.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from toolkit.base.errors import DefectError, UnsupportedError
from toolkit.engine.live_weights import uses_transformers_backend
from toolkit.policy.attention import choose_attention
from toolkit.policy.weight_names import FALLBACK_ADVICE, SHARE_WEIGHTS_KEY

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from toolkit.engine.engine import Engine


def build_meta_model(engine: Engine, attn_implementation: str | None) -> PreTrainedModel:
    """Create a Hugging Face model of the engine's checkpoint. Its parameters are on the meta
    device, and its buffers are real tensors on the engine's device.

    Raises:
        UnsupportedError: the checkpoint also stores buffers.
    """
    options = engine.options
    config = AutoConfig.from_pretrained(options.model, revision=options.revision)
    device = next(engine.module.parameters()).device
    attention = choose_attention(config, attn_implementation, options.model)
    attention_kwargs = {} if attention is None else {"attn_implementation": attention}
    is_patched = uses_transformers_backend(engine.module)
    create_model = (
        unpatched_class(config)._from_config if is_patched else AutoModelForCausalLM.from_config
    )
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = create_model(config, dtype=engine.dtype, **attention_kwargs)
    model.tie_weights()
    stored_buffers = set(model.state_dict()) - {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    if stored_buffers:
        raise UnsupportedError(
            "the checkpoint also stores buffers, which cannot be shared: "
            f"{', '.join(sorted(stored_buffers)[:3])}",
            where=SHARE_WEIGHTS_KEY,
            fix=FALLBACK_ADVICE,
        )
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.config.name_or_path = options.model
    model.name_or_path = options.model
    # If the checkpoint has no generation config, the values from the model's config are kept.
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(
            options.model, revision=options.revision
        )
    return model


def unpatched_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the model class of ``config`` as it was before vLLM changed it.

    If vLLM has no model class for the architecture, it runs the Hugging Face class. vLLM then
    changes this class for the whole process. In vLLM 0.31.0, ``support_torch_compile`` changes the
    bases, ``__init__`` and ``__call__``. The changed class cannot be used outside vLLM. So the
    class's file is imported a second time under another name.
    """
    patched_class = AutoModelForCausalLM._model_mapping[type(config)]
    name = f"{patched_class.__module__}_untouched"
    if name not in sys.modules:
        origin = sys.modules[patched_class.__module__].__file__
        spec = importlib.util.spec_from_file_location(name, origin)
        if spec is None or spec.loader is None:
            raise DefectError(f"{patched_class.__module__} cannot be imported a second time")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    original_class: type[PreTrainedModel] = getattr(sys.modules[name], patched_class.__name__)
    return original_class

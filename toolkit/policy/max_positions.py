"""Set the number of positions of a model (its maximum sequence length). The number must be set if
``rope_scaling`` is given, or if ``max_seq_length`` is larger than the length that the model was
trained with.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from toolkit.base.errors import ConfigValueError, ToolkitWarning, UnsupportedError
from toolkit.policy.load_arguments import WHERE

if TYPE_CHECKING:
    from toolkit.policy.load_request import LoadRequest


def set_positions(config: Any, request: LoadRequest, name: str) -> None:
    """Apply the argument ``rope_scaling`` to ``config``. If it is not given, but ``max_seq_length``
    is larger than the length that the model was trained with, extend the positions by dynamic NTK
    scaling.

    Dynamic NTK scaling does not change the results for sequences within the trained length.
    """
    trained_length = getattr(config, "max_position_embeddings", None)
    max_seq_length = request.max_seq_length
    exceeds_trained = (
        max_seq_length is not None
        and trained_length is not None
        and max_seq_length > trained_length
    )
    if exceeds_trained and request.fast_inference:
        raise ConfigValueError(
            f"max_seq_length={max_seq_length} is beyond the {trained_length} positions of {name}, "
            "and an engine cannot extend them",
            where=WHERE,
            fix=f"pass max_seq_length={trained_length} or less, or pass fast_inference=False",
        )
    scaling = dict(request.rope_scaling) if request.rope_scaling else None
    rope_parameters = getattr(config, "rope_parameters", None) or {}
    if scaling is None and not exceeds_trained:
        return
    if rope_parameters.get("rope_type") is None:
        raise UnsupportedError(
            f"the positions of {config.model_type!r} models cannot be extended by rope_scaling",
            where=name,
            fix=f"use a max_seq_length of at most {trained_length}, and remove rope_scaling",
        )
    if scaling is None:
        assert max_seq_length is not None
        assert trained_length is not None
        if rope_parameters["rope_type"] != "default":
            raise ConfigValueError(
                f"max_seq_length={max_seq_length} is beyond the {trained_length} positions of "
                f"{name}, whose"
                f" config already extends them (rope_type {rope_parameters['rope_type']})",
                where=WHERE,
                fix=f"pass max_seq_length={trained_length} or less, or pass your own rope_scaling",
            )
        scaling = {"rope_type": "dynamic", "factor": max_seq_length / trained_length}
        warnings.warn(
            f"max_seq_length={max_seq_length} is beyond the {trained_length} positions of {name}. "
            f"Sequences of more than {trained_length} tokens use rope_scaling={scaling}",
            ToolkitWarning,
            stacklevel=4,
        )
    legacy_type = scaling.pop("type", None)
    scaling.setdefault("rope_type", legacy_type)
    rope_types = ("default", *sorted(ROPE_INIT_FUNCTIONS))
    if scaling["rope_type"] not in rope_types:
        raise ConfigValueError(
            f"rope_scaling={dict(request.rope_scaling or {})!r}: rope_type must be one of"
            f" {', '.join(rope_types)}",
            where=WHERE,
        )
    scaling.setdefault("rope_theta", rope_parameters.get("rope_theta"))
    config.rope_parameters = scaling
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigValueError(f"rope_scaling={scaling!r}: {error}", where=WHERE) from error

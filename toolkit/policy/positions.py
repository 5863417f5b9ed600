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
    longest = getattr(config, "max_position_embeddings", None)
    wanted = request.max_seq_length
    beyond = wanted is not None and longest is not None and wanted > longest
    if beyond and request.fast_inference:
        raise ConfigValueError(
            f"max_seq_length={wanted} is beyond the {longest} positions of {name}, and an engine"
            " cannot extend them",
            where=WHERE,
            fix=f"pass max_seq_length={longest} or less, or pass fast_inference=False",
        )
    scaling = dict(request.rope_scaling) if request.rope_scaling else None
    current = getattr(config, "rope_parameters", None) or {}
    if scaling is None and not beyond:
        return
    if current.get("rope_type") is None:
        raise UnsupportedError(
            f"the positions of {config.model_type!r} models cannot be extended by rope_scaling",
            where=name,
            fix=f"use a max_seq_length of at most {longest}, and remove rope_scaling",
        )
    if scaling is None:
        assert wanted is not None
        assert longest is not None
        if current["rope_type"] != "default":
            raise ConfigValueError(
                f"max_seq_length={wanted} is beyond the {longest} positions of {name}, whose"
                f" config already extends them (rope_type {current['rope_type']})",
                where=WHERE,
                fix=f"pass max_seq_length={longest} or less, or pass your own rope_scaling",
            )
        scaling = {"rope_type": "dynamic", "factor": wanted / longest}
        warnings.warn(
            f"max_seq_length={wanted} is beyond the {longest} positions of {name}. "
            f"Sequences of more than {longest} tokens use rope_scaling={scaling}",
            ToolkitWarning,
            stacklevel=4,
        )
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind)
    kinds = ("default", *sorted(ROPE_INIT_FUNCTIONS))
    if scaling["rope_type"] not in kinds:
        raise ConfigValueError(
            f"rope_scaling={dict(request.rope_scaling or {})!r}: rope_type must be one of"
            f" {', '.join(kinds)}",
            where=WHERE,
        )
    scaling.setdefault("rope_theta", current.get("rope_theta"))
    config.rope_parameters = scaling
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigValueError(f"rope_scaling={scaling!r}: {error}", where=WHERE) from error

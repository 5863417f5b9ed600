"""Define ``FastModel`` and ``FastVisionModel``, which scripts for Unsloth use in place of
``FastLanguageModel``.

Only text models are supported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from toolkit.base.errors import ConfigValueError, UnsupportedError
from toolkit.policy.language_model import DEFAULT_TARGETS, FastLanguageModel
from toolkit.policy.lora_settings import WHERE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

ATTENTION, MLP = DEFAULT_TARGETS[:4], DEFAULT_TARGETS[4:]


class FastModel(FastLanguageModel):
    """The same as ``FastLanguageModel``, except that ``get_peft_model`` has four more arguments,
    the switches ``finetune_*``. The switches select the layers that get an adapter.
    """

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel,
        *args: Any,
        target_modules: Sequence[str] | str | None = None,
        finetune_vision_layers: bool = False,
        finetune_language_layers: bool = True,
        finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Call ``FastLanguageModel.get_peft_model``. If ``target_modules`` is None or "all-linear",
        the arguments ``finetune_*`` select the layers to adapt: the projections of attention, the
        projections of the MLP, or both groups.

        Raises:
            UnsupportedError: ``finetune_vision_layers`` is True.
            ConfigValueError: the arguments ``finetune_*`` leave no layer to train.

        ``FastLanguageModel.get_peft_model`` raises further errors.
        """
        if finetune_vision_layers:
            raise UnsupportedError(
                "finetune_vision_layers=True is not supported: only the language model is loaded "
                "and trained",
                where=WHERE,
                fix="pass finetune_vision_layers=False",
            )
        if not finetune_language_layers or not (finetune_attention_modules or finetune_mlp_modules):
            raise ConfigValueError(
                "the finetune_* switches leave no layer to train",
                where=WHERE,
                fix="pass finetune_language_layers=True, and pass True for at least one of"
                " finetune_attention_modules and finetune_mlp_modules",
            )
        if target_modules is None or target_modules == "all-linear":
            adapts_both = finetune_attention_modules and finetune_mlp_modules
            one_group = ATTENTION if finetune_attention_modules else MLP
            target_modules = DEFAULT_TARGETS if adapts_both else one_group
        return FastLanguageModel.get_peft_model(
            model, *args, **{"target_modules": target_modules, **kwargs}
        )


class FastVisionModel:
    """A class whose methods raise UnsupportedError, because images are not supported."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
        """Raise UnsupportedError, because images are not supported."""
        del args, kwargs
        raise _text_only_error()

    @staticmethod
    def get_peft_model(*args: Any, **kwargs: Any) -> NoReturn:
        """Raise UnsupportedError, because images are not supported."""
        del args, kwargs
        raise _text_only_error()


def _text_only_error() -> UnsupportedError:
    return UnsupportedError(
        "only text models are supported, not models that read images",
        where="FastVisionModel",
        fix="use FastLanguageModel with a text-only model",
    )

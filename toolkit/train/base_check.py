"""Check that a run does not change the base weights.

The checksum of the base weights at the end of a run must equal their checksum at its start. It is
also an error if the base weights change after the model is loaded and before the run starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolkit.base.errors import ConfigValueError, DefectError, UnsupportedError
from toolkit.engine.mesh import current_mesh
from toolkit.policy.base_checksum import (
    CHECKSUMS_ATTRIBUTE,
    base_checksums,
    changed_tensors,
    checksums_digest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


RELOAD_FIX = (
    "load the model again. Do not change its weights, and do not merge an adapter into them"
)


class BaseCheck:
    """Checksums of the frozen weights of ``model``, to compare with later checksums. They were
    computed when the engine loaded the weights. For a model without an engine, they are computed
    when this object is created.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        at_load = getattr(model, CHECKSUMS_ATTRIBUTE, None)
        self._model, self._before = model, at_load if at_load is not None else base_checksums(model)

    def refuse_changed(self) -> None:
        """Check before a run that the base weights are unchanged since the engine loaded them.

        Raises:
            ConfigValueError: some code changed the weights, which engine and trainer share.
        """
        if changed_names := changed_tensors(self._before, base_checksums(self._model)):
            raise ConfigValueError(
                f"the base model changed after the engine loaded it: {_summarize(changed_names)}. "
                "The engine and the trainer share the weights of the base model",
                where="model",
                fix=RELOAD_FIX,
            )

    def result(self) -> dict[str, Any]:
        """Check after a run that the base weights did not change. Return the entry for
        manifest.json: the number of tensors and their checksum.

        Raises:
            DefectError: a frozen weight changed during the run.
        """
        after = base_checksums(self._model)
        if changed_names := changed_tensors(self._before, after):
            raise DefectError(
                f"the base model changed during the run: {_summarize(changed_names)}. The trained "
                "adapter therefore does not fit the base model on disk",
                where="model",
                fix="do not use this adapter. Remove code that changes the weights from your "
                "rewards and callbacks. If there is no such code, report a defect",
            )
        checksum = checksums_digest(after)
        if (process_mesh := current_mesh()) is not None:
            checksum = process_mesh.combined_digest(checksum)
        return {"tensors": len(after), "checksum": checksum, "unchanged": True}


def refuse_untrainable(model: PreTrainedModel, engine: Any) -> None:
    """Check that the model has trainable parameters, and that the engine does not share them.

    Raises:
        ConfigValueError: the model has no trainable parameter.
        UnsupportedError: a weight that is shared with the engine is trainable.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ConfigValueError(
            "the model has no trainable parameter",
            where="GRPOTrainer",
            fix="add an adapter with FastLanguageModel.get_peft_model, or pass peft_config "
            "to GRPOTrainer",
        )
    module = getattr(engine, "module", None)
    if module is None:
        return
    engine_storages = {p.untyped_storage().data_ptr() for p in module.parameters()}
    shared_names = [
        name for name, p in trainable.items() if p.untyped_storage().data_ptr() in engine_storages
    ]
    if shared_names:
        raise UnsupportedError(
            "the trainer would train weights from which the engine samples: "
            f"{_summarize(shared_names)}",
            where="GRPOTrainer",
            fix="train only an adapter, or load the model with fast_inference=False",
        )


def _summarize(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} weights (first {names[0]})"

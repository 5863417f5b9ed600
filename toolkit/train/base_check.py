"""The base never changes: proven at the end of each run, and refused where it is known before."""

from __future__ import annotations

from typing import Any

from toolkit.base.errors import ConfigValueError, DefectError, UnsupportedError
from toolkit.engine.mesh import mesh
from toolkit.policy.base_sums import AT_LOAD, base_sums, changed, digest

AGAIN = "load the model again; do not write to its weights or merge an adapter into them"


class BaseCheck:
    """Sums of the frozen weights of ``model``: since its engine loaded them, else since now."""

    def __init__(self, model: Any) -> None:
        at_load = getattr(model, AT_LOAD, None)
        self._model, self._before = model, at_load if at_load is not None else base_sums(model)

    def refuse_changed(self) -> None:
        """Before a run.

        Raises:
            ConfigValueError: the weights that engine and trainer share were written to.
        """
        if names := changed(self._before, base_sums(self._model)):
            raise ConfigValueError(
                f"{_told(names)} of the base changed after the engine loaded them: engine and"
                " trainer share these weights",
                where="model",
                fix=AGAIN,
            )

    def result(self) -> dict[str, Any]:
        """After a run: how many tensors there are and their checksum, as in manifest.json.

        Raises:
            DefectError: a frozen weight changed during the run.
        """
        after = base_sums(self._model)
        if names := changed(self._before, after):
            raise DefectError(
                f"{_told(names)} of the base changed during the run, and only the adapter may: the"
                " adapter does not belong to the base that it was loaded on",
                where="model",
                fix="do not use this adapter; check rewards and callbacks for code that writes to"
                " the model, else report it",
            )
        checksum = digest(after)
        if (shared := mesh()) is not None:
            checksum = shared.digest_of_all(checksum)
        return {"tensors": len(after), "checksum": checksum, "unchanged": True}


def refuse_untrainable(model: Any, engine: Any) -> None:
    """What is trained must be an adapter's own.

    Raises:
        ConfigValueError: nothing is trained.
        UnsupportedError: weights are trained that the engine shares.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigValueError(
            "the model has no trainable parameter",
            where="GRPOTrainer",
            fix="put an adapter on it with FastLanguageModel.get_peft_model, or pass peft_config",
        )
    module = getattr(engine, "module", None)
    if module is None:
        return
    shared = {p.untyped_storage().data_ptr() for p in module.parameters()}
    own = [name for name, p in trained.items() if p.untyped_storage().data_ptr() in shared]
    if own:
        raise UnsupportedError(
            f"{_told(own)} would be trained, and the engine samples from the same weights",
            where="GRPOTrainer",
            fix="train an adapter only, or load with fast_inference=False",
        )


def _told(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} weights (first {names[0]})"

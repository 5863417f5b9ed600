"""Publish the adapter that is being trained: copy it from memory into the engine's LoRA slots.

vLLM keeps the LoRA matrices of all adapters in stacked tensors on the device. A *slot* is the part
of these tensors that belongs to one adapter. At the first publish, vLLM's own manager registers the
adapter and chooses its slot. Every later publish only copies values into that slot. The addresses
of the stacked tensors do not change, so captured CUDA graphs stay valid.

The scaling of an adapter is alpha/r, or alpha/sqrt(r) with rsLoRA (arXiv 2106.09685, 2312.03732).
The copy multiplies the LoRA matrix B by the scaling, in the trainer's dtype. So vLLM must not scale
B again, and gets alpha = r. With another alpha, ``LoRALayerWeights.optimize`` of vLLM would
multiply the tensor lora_B in place by alpha/r. The scaling is not left to vLLM, because
before 0.31 vLLM ignores rsLoRA when it packs expert layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from toolkit.base.errors import ConfigValueError, DefectError, UnsupportedError
from toolkit.engine.live_weights import engine_name, rename_mapper
from toolkit.engine.shards import gather_full_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

PEFT_PREFIX = "base_model.model."
PLAIN_VARIANTS = ("NoneType", "MiCALinearVariant")
"""The class names of PEFT 0.21's LoRA variants that compute W + s B A. "NoneType" is plain LoRA.
MiCA computes the same sum, but does not train B.
"""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The LoRA matrices of one adapted layer: A is ``a`` (r, in), and B is ``b`` (out, r). B is
    multiplied by ``scaling``.

    The tensors are references to the model's tensors, not copies. ``trained_b`` is the trained
    parameter for B. If tensor parallelism splits the layer, ``b`` has only the rows of
    ``trained_b`` that this process computes with. Otherwise ``b`` is ``trained_b``.
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    trained_b: torch.Tensor

    @property
    def rank(self) -> int:
        """The adapter's rank on this layer."""
        return int(self.a.shape[0])


@dataclass(slots=True)
class CopyPlan:
    """The trained tensors (``a_from``, ``b_from``), and the tensors that they are copied to
    (``a_to``, ``b_to``). The target tensors are parts of the adapter's LoRA slot.

    These four attributes are lists, because torch copies lists of tensors in one fused kernel
    (``torch._foreach_copy_``).
    """

    signature: tuple[object, ...]
    a_from: list[torch.Tensor] = field(default_factory=list)
    a_to: list[torch.Tensor] = field(default_factory=list)
    b_from: list[torch.Tensor] = field(default_factory=list)
    b_to: list[torch.Tensor] = field(default_factory=list)
    scalings: list[float] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> None:
        """Copy the trained tensors into the slot, and convert the copies to the slot's dtype. The
        trained tensors do not change.
        """
        torch._foreach_copy_(self.a_to, self.a_from)
        if all(factor == 1.0 for factor in self.scalings):
            torch._foreach_copy_(self.b_to, self.b_from)
        else:
            torch._foreach_copy_(self.b_to, torch._foreach_mul(self.b_from, self.scalings))


NamedLayers = list[tuple[str, Any]]
"""The adapted layers of a PEFT model, with their paths in the model."""


def find_lora_layers(peft_model: PreTrainedModel) -> NamedLayers:
    """Return the adapted layers of a PEFT model."""
    named_modules = peft_model.named_modules()
    return [(path, module) for path, module in named_modules if isinstance(module, LoraLayer)]


class LoraLayerCache:
    """Keeps the list of the adapted layers for each adapter. The list is made once, because finding
    the layers again in every step would take milliseconds.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Any, Any, NamedLayers]] = {}

    def layers_of(self, peft_model: PreTrainedModel, name: str) -> NamedLayers:
        """Return the adapted layers of ``peft_model``. The list is made again if the model or the
        config of adapter ``name`` is another object than before.
        """
        config = getattr(peft_model, "peft_config", {}).get(name)
        entry = self._entries.get(name)
        if entry is None or entry[0] is not peft_model or entry[1] is not config:
            entry = self._entries[name] = (peft_model, config, find_lora_layers(peft_model))
        return entry[2]

    def clear(self) -> None:
        """Drop the references to models and layers."""
        self._entries.clear()


def read_lora_pairs(
    peft_model: PreTrainedModel, name: str, layers: NamedLayers | None = None
) -> list[LoraPair]:
    """Return a ``LoraPair`` (the LoRA matrices A and B) for each layer that adapter ``name`` of a
    PEFT model adapts. ``layers`` are the adapted layers of the model if they are known.

    Raises:
        ConfigValueError: the model has no adapter of that name.
        UnsupportedError: the adapter has parts that vLLM's slots do not support (DoRA, biases,
            experts, ``modules_to_save``).
    """
    config = getattr(peft_model, "peft_config", {}).get(name)
    if config is None:
        raise ConfigValueError(
            f"the model has no adapter named {name!r}",
            where="publish",
            fix="call get_peft_model first",
        )
    if getattr(config, "modules_to_save", None):
        raise UnsupportedError(
            f"modules_to_save={list(config.modules_to_save)} would train whole modules, but "
            "their weights are shared with the engine and must not change",
            where="lora.modules_to_save",
            fix="remove `modules_to_save`, or set `fast_inference: false`",
        )
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UnsupportedError(
            f"adapter {name!r} is a {kind} adapter, but vLLM supports only LoRA",
            where="publish",
            fix="use `peft.LoraConfig`, or load the model with `fast_inference=False`",
        )
    pairs = []
    for path, module in find_lora_layers(peft_model) if layers is None else layers:
        if name in module.lora_embedding_A:
            raise UnsupportedError(
                f"the engine does not support LoRA on the embedding {path}",
                where="lora.target_modules",
            )
        if name not in module.lora_A:
            continue
        a, b = module.lora_A[name], module.lora_B[name]
        variant = type(module.lora_variant.get(name)).__name__
        if getattr(b, "bias", None) is not None or variant not in PLAIN_VARIANTS:
            raise UnsupportedError(
                f"{path} has a LoRA bias, DoRA or another variant, which vLLM does not support",
                where="lora",
            )
        if a.weight.dim() != 2 or hasattr(module, "parameter_name"):
            raise UnsupportedError(
                f"{path.removeprefix(PEFT_PREFIX)} is a weight of the experts or of their "
                "router. The engine does not support LoRA on such weights",
                where="lora.target_modules",
                fix="set `target_modules` to the attention projections, or set `fast_inference: "
                "false`",
            )
        used_rows = module.used_rows(name) if hasattr(module, "used_rows") else b.weight
        module_name = path.removeprefix(PEFT_PREFIX)
        pairs.append(
            LoraPair(module_name, a.weight, used_rows, float(module.scaling[name]), b.weight)
        )
    return pairs


class AdapterSlots:
    """Copies adapters into the LoRA slots of one engine. ``lora_manager`` is vLLM's
    LoRAModelManager, and ``module`` is vLLM's model.
    """

    def __init__(self, lora_manager: Any, module: Any, max_lora_rank: int) -> None:
        self._manager = lora_manager
        self._module = module
        self._max_rank = max_lora_rank
        self._copy_plans: dict[str, CopyPlan] = {}
        self._layer_cache = LoraLayerCache()
        self.adapter_ids: dict[str, int] = {}

    def publish(self, peft_model: PreTrainedModel, name: str) -> None:
        """Copy the current values of adapter ``name`` into its slot.

        Raises:
            ConfigValueError: the adapter's rank is above ``max_lora_rank``.
            UnsupportedError: the engine has no slot for a layer of the adapter.
        """
        pairs = read_lora_pairs(peft_model, name, self._layer_cache.layers_of(peft_model, name))
        if not pairs:
            raise ConfigValueError(
                (f"adapter {name!r} does not adapt any layer"), where="lora.target_modules"
            )
        signature = tuple(
            (pair.module, pair.a.data_ptr(), pair.b.data_ptr(), pair.rank) for pair in pairs
        )
        plan = self._copy_plans.get(name)
        if plan is None or plan.signature != signature or not self.is_active(name):
            self._check_ranks(pairs)
            self._register(pairs, name)
            plan = self._copy_plans[name] = self._build_copy_plan(
                pairs, self._slot_index(name), signature
            )
        plan.scalings = [
            pair.scaling for pair in pairs for _ in range(len(self._slot_locations(pair.module)))
        ]
        plan.run()

    def is_active(self, name: str) -> bool:
        """Return True if adapter ``name`` was published and no other adapter has replaced it in
        its slot.
        """
        return (
            self.adapter_ids.get(name) in self._manager.lora_index_to_id
            if name in self.adapter_ids
            else False
        )

    def clear(self) -> None:
        """Drop all references to trained tensors, and forget which adapters were published."""
        self._copy_plans.clear()
        self._layer_cache.clear()
        self.adapter_ids.clear()

    def _check_ranks(self, pairs: Sequence[LoraPair]) -> None:
        rank = max(pair.rank for pair in pairs)
        if rank > self._max_rank:
            raise ConfigValueError(
                (
                    f"the adapter has rank {rank}, but the engine supports ranks up to "
                    f"{self._max_rank}"
                ),
                where="lora.r",
                fix=(
                    f"set `max_lora_rank` to at least {rank} when you load the model, or set the "
                    f"LoRA rank `r` to at most {self._max_rank}"
                ),
            )

    def _slot_index(self, name: str) -> int:
        return int(self._manager.lora_index_to_id.index(self.adapter_ids[name]))

    def _register(self, pairs: Sequence[LoraPair], name: str) -> None:
        """Call vLLM's functions that register the adapter ``name``. These functions get copies of
        the trained tensors, because they change the tensors in place.
        """
        for pair in pairs:
            self._slot_locations(
                pair.module
            )  # raises an error; vLLM would skip the module silently
        adapter_id = self.adapter_ids.setdefault(name, 1 + len(self.adapter_ids))
        rank = max(pair.rank for pair in pairs)
        dtype = self._manager.lora_config.lora_dtype
        tensors: dict[str, torch.Tensor] = {}
        for pair in pairs:
            prefix = PEFT_PREFIX + pair.module
            # If tensor parallelism splits the layer, vLLM selects the part of this process itself.
            # So vLLM always gets the whole tensors.
            tensors[f"{prefix}.lora_A.weight"] = (
                gather_full_tensor(pair.a).detach().to("cpu", dtype, copy=True)
            )
            scaled_b = gather_full_tensor(pair.trained_b).detach() * pair.scaling
            tensors[f"{prefix}.lora_B.weight"] = scaled_b.to("cpu", dtype, copy=True)
        adapter = LoRAModel.from_lora_tensors(
            adapter_id,
            tensors,
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device="cpu",  # vLLM keeps these copies, so they must not use GPU memory
            dtype=dtype,
            weights_mapper=rename_mapper(self._module),
            skip_prefixes=getattr(self._module, "lora_skip_prefixes", None),
        )
        self._manager.remove_adapter(adapter_id)
        self._manager.add_adapter(adapter)
        self._manager.activate_adapter(adapter_id)

    def _build_copy_plan(
        self, pairs: Sequence[LoraPair], slot_index: int, signature: tuple[object, ...]
    ) -> CopyPlan:
        plan = CopyPlan(signature)
        for pair in pairs:
            start = 0
            for layer, part in self._slot_locations(pair.module):
                a, b = (
                    layer.lora_a_stacked[part][slot_index, 0],
                    layer.lora_b_stacked[part][slot_index, 0],
                )
                rows = b.shape[0]
                plan.a_from.append(pair.a.detach())
                plan.a_to.append(a[: pair.rank, : pair.a.shape[1]])
                plan.b_from.append(pair.b.detach()[start : start + rows])
                plan.b_to.append(b[:, : pair.rank])
                start += rows
            if start != pair.b.shape[0]:
                raise DefectError(
                    f"the LoRA matrix B of {pair.module} has {pair.b.shape[0]} rows, but the "
                    f"engine's slots for this matrix have {start} rows"
                )
        return plan

    def _slot_locations(self, module: str) -> list[tuple[Any, int]]:
        """Return where this engine stores the LoRA matrices of the Hugging Face layer ``module``.
        ``find_slot_locations`` describes the result.
        """
        return find_slot_locations(
            module, self._manager.modules, self._manager.packed_modules_mapping, self._module
        )


def find_slot_locations(
    module: str, layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]], vllm_module: Any
) -> list[tuple[Any, int]]:
    """Return where vLLM stores the LoRA matrices of the Hugging Face layer ``module``, as a list of
    (vLLM layer, index of a part of this layer).

    vLLM fuses layers such as q_proj, k_proj and v_proj into one layer. In this case the list has
    one entry, and the index tells which part ``module`` is. If the Hugging Face layer itself is
    fused (such as gate_up_proj), the list has one entry per part.

    Raises:
        UnsupportedError: the engine has no LoRA slot for ``module``, vLLM's model class skips
            adapters under this name, or vLLM's latent attention does not call the layer.
    """
    name = engine_name(vllm_module, module)
    for prefix in getattr(vllm_module, "lora_skip_prefixes", None) or ():
        if f".{prefix}" in name or name.startswith(prefix):
            raise UnsupportedError(
                f"vLLM ignores an adapter on {module}, because vLLM's class for this model skips "
                f"all modules under {prefix!r}",
                where="lora.target_modules",
            )
    parent, _, leaf = name.rpartition(".")
    if leaf == "kv_b_proj" and hasattr(vllm_module.get_submodule(parent), "mla_attn"):
        # The slots exist, but an adapter in them would have no effect: vLLM uses the layer without
        # LoRA for prompts, and copies of its weight (W_UK and W_UV) for later tokens.
        raise UnsupportedError(
            f"vLLM's multi-head latent attention (MLA) ignores an adapter on {module}",
            where="lora.target_modules",
            fix="remove `kv_b_proj` from `target_modules`, or set `fast_inference: false`",
        )
    for fused, parts in packed.items():
        if leaf in parts and len(parts) > 1:
            layer = layers.get(f"{parent}.{fused}" if parent else fused)
            if layer is not None:
                return [(layer, list(parts).index(leaf))]
    layer = layers.get(name)
    if layer is None or not hasattr(layer, "lora_a_stacked"):
        raise UnsupportedError(
            f"the engine has no LoRA slot for {module}",
            where="lora.target_modules",
            fix=f"remove `{name.rpartition('.')[2]}` from `target_modules`, or set "
            "`fast_inference: false`",
        )
    return [(layer, part) for part in range(len(layer.lora_a_stacked))]

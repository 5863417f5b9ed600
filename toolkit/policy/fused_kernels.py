"""Use fused kernels of liger-kernel in a model's RMSNorm, rotary embedding and gated MLP layers.

Before a kernel is used, its outputs and gradients are compared with those of the layer, once for
each kind of layer. The comparison uses a small random input, and the device and dtype of the model.
A kernel with different results is not used. Only the ``forward`` methods of the layer instances are
replaced. So the parameters may be views of an engine's tensors, and other models in the process do
not change.

Written for liger-kernel 0.8.5 (its ``functional`` module) and transformers 5.17.
"""

from __future__ import annotations

import inspect
import types
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from toolkit.base.errors import ConfigValueError, MissingExtraError, first_line
from toolkit.engine.oom_backoff import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Forward = Callable[..., Any]

CONFIG_KEY = "runtime.fused_kernels"
ROTARY_FUNCTION = "apply_rotary_pos_emb"
"""The name of the function that applies rotary embeddings to queries and keys, in the modules of
transformers.
"""
MAX_ROUNDING_ERRORS = 2
"""The largest allowed difference between kernel and layer (root mean square, relative), in rounding
errors of the dtype.
"""
_MIN_RELATIVE_ERROR = 1e-5  # smallest limit, because the order of additions matters in float32
_TOKENS, _HEADS = 16, 4


class Kernels(NamedTuple):
    """The kernel functions, with the signatures of ``liger_kernel.transformers.functional``.

    ``rms_norm(x, weight, eps, offset, casting, in_place)``, ``rotary(q, k, cos, sin)``,
    ``swiglu(gate, up)``, ``geglu(gate, up)``.
    """

    rms_norm: Forward
    rotary: Forward
    swiglu: Forward
    geglu: Forward


@dataclass(slots=True)
class AppliedKernels:
    """Which layers use a kernel. ``layers`` maps a class name to the number of its layers that use
    a kernel. ``refusal_reasons`` maps the name of any other class to the reason why its layers use
    no kernel. If liger-kernel is not installed, ``refusal_reasons`` has only the key "all layers".
    """

    layers: dict[str, int] = field(default_factory=dict)
    refusal_reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        used = ", ".join(f"{name} x {count}" for name, count in self.layers.items())
        return used or "none"


def load_kernels() -> Kernels | None:
    """Return Liger's kernel functions, or None if liger-kernel is not installed."""
    try:
        from liger_kernel.transformers import functional  # noqa: PLC0415 - with the cuda extra
    except ImportError:
        return None
    return Kernels(
        functional.liger_rms_norm,
        functional.liger_rope,
        functional.liger_swiglu,
        functional.liger_geglu,
    )


def use_fused_kernels(model: nn.Module, requested: bool | str) -> AppliedKernels | None:
    """Use fused kernels in ``model`` if ``requested`` (``runtime.fused_kernels``) is True or
    "auto".

    Call this function before an adapter is put on the model. With "auto", kernels are used if the
    model is on a CUDA device and liger-kernel is installed. Returns the layers with and without a
    kernel, or None if ``requested`` is False or the model is not on a CUDA device.

    Raises:
        ConfigValueError: ``requested`` is True, but the model is not on a CUDA device.
        MissingExtraError: ``requested`` is True, but liger-kernel is not installed.
    """
    if requested is False:
        return None
    device = next(model.parameters()).device
    if device.type != "cuda":
        if requested is True:
            raise ConfigValueError(
                (
                    f"fused_kernels is true, but the model is on {device.type}, and the kernels "
                    "need CUDA"
                ),
                where=CONFIG_KEY,
                fix="set fused_kernels: auto",
            )
        return None
    kernels = load_kernels()
    if kernels is None:
        if requested is True:
            raise MissingExtraError(
                "fused_kernels is true, but liger-kernel is not installed",
                where=CONFIG_KEY,
                fix="run `pip install 'grpo-toolkit[cuda]'`, or set fused_kernels: auto",
            )
        return AppliedKernels(refusal_reasons={"all layers": "liger-kernel is not installed"})
    return apply_kernels(model, kernels)


def apply_kernels(model: nn.Module, kernels: Kernels) -> AppliedKernels:
    """Use fused kernels in the layers of ``model``. A layer uses a kernel only if the kernel
    computes the same result as the layer. Returns the layers with and without a kernel.
    """
    applied = AppliedKernels()
    modules_by_kind: dict[tuple[Any, ...], list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for kind in _layer_kinds(module):
            modules_by_kind[kind].append(module)
    for (layer_type, module_class, *_), modules in modules_by_kind.items():
        class_name = module_class.__name__
        try:
            forward = _FUSED_FORWARDS[layer_type](model, modules[0], kernels)
        except Exception as error:  # a kernel that raises any error is not used
            if is_out_of_memory(error):
                raise
            applied.refusal_reasons[class_name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        if isinstance(forward, str):
            applied.refusal_reasons[class_name] = forward
            continue
        for module in modules:
            module.forward = types.MethodType(forward, module)
        applied.layers[class_name] = applied.layers.get(class_name, 0) + len(modules)
    return applied


def _layer_kinds(module: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield one tuple for each kind of kernel that ``module`` may use. Layers with equal tuples are
    of the same kind. The first entry of the tuple is "norm", "mlp" or "rotary", and the second is
    the module's class. The other entries are properties in which layers of one class may differ,
    such as the shape.
    """
    cls = type(module)
    if "RMSNorm" in cls.__name__ and _takes_one_input(module) and _epsilon(module) is not None:
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 1:
            yield "norm", cls, tuple(weight.shape), weight.dtype, _epsilon(module)
    projections = ("gate_proj", "up_proj", "down_proj")
    layers = [getattr(module, projection, None) for projection in projections]
    if _takes_one_input(module) and all(isinstance(layer, nn.Linear) for layer in layers):
        sizes = [(layer.in_features, layer.out_features) for layer in layers if layer is not None]
        yield "mlp", cls, *sizes
    forward = cls.forward
    if isinstance(forward, types.FunctionType) and ROTARY_FUNCTION in forward.__code__.co_names:
        yield "rotary", cls, getattr(module, "head_dim", None), getattr(module, "layer_type", None)


def _takes_one_input(module: nn.Module) -> bool:
    # The two parameters are self and the input.
    return len(inspect.signature(type(module).forward).parameters) == 2


def _epsilon(module: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


# --- one function for each kind of layer, which returns a ``forward`` that uses the kernel, or the
# --- reason why the kernel cannot be used


def _fused_norm(model: nn.Module, module: nn.Module, kernels: Kernels) -> Forward | str:
    """Return a ``forward`` for the norm layer ``module`` that uses the RMSNorm kernel, or the
    reason why the kernel cannot be used.

    Three variants of the kernel are tried, for the norms of Llama, Gemma and OLMo 2. Llama
    multiplies by the weight in the weight's dtype. Gemma multiplies by 1 + weight in float32. OLMo
    2 multiplies by the weight in float32.
    """
    weight, eps = module.weight, _epsilon(module)
    assert isinstance(weight, nn.Parameter)
    forwards = []
    for offset, casting_mode in ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma")):
        # With in_place=True the kernel would overwrite a gradient that the residual connection
        # also uses.
        kernel = partial(kernels.rms_norm, offset=offset, casting_mode=casting_mode, in_place=False)
        forwards.append(_norm_forward(kernel, eps))
    shape = (1, _TOKENS, weight.shape[0])
    return _first_equal_forward(module, forwards, shape, _weight_dtype(model))


def _norm_forward(kernel: Forward, eps: float | None) -> Forward:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = kernel(hidden_states, self.weight, eps)
        return normed

    return forward


def _fused_mlp(model: nn.Module, module: nn.Module, kernels: Kernels) -> Forward | str:
    """Return a ``forward`` for the MLP ``module`` that uses the kernel for its activation function,
    or the reason why no kernel can be used.

    The module's activation function decides which kernel is used. This function is compared in
    float32 with the activation functions of the kernels, because in bfloat16 the two forms of GELU
    (exact and tanh) cannot be distinguished.
    """
    activation: Any = getattr(module, "act_fn", None)
    if activation is None:
        return "the layer has no attribute act_fn"
    samples = torch.linspace(-6, 6, 97)
    activated = activation(samples)
    for kernel, activation_function in (
        (kernels.swiglu, nn.functional.silu),
        (kernels.geglu, partial(nn.functional.gelu, approximate="tanh")),
    ):
        if torch.allclose(activated, activation_function(samples), atol=1e-6):
            gate: Any = module.gate_proj
            shape = (1, _TOKENS, gate.in_features)
            return _first_equal_forward(module, [_mlp_forward(kernel)], shape, _weight_dtype(model))
    return f"there is no kernel for the layer's activation {type(activation).__name__}"


def _mlp_forward(kernel: Forward) -> Forward:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(kernel(self.gate_proj(x), self.up_proj(x)))
        return out

    return forward


def _fused_rotary(model: nn.Module, module: nn.Module, kernels: Kernels) -> Forward | str:
    """Copy the ``forward`` of the module's class, and let the kernel apply the rotary embedding in
    the copy. Return the copy. If the kernel cannot be used, return the reason.
    """
    class_forward = type(module).forward
    apply_rotary = class_forward.__globals__[ROTARY_FUNCTION]
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int):
        return "the layer has no integer attribute head_dim"
    dtype = _weight_dtype(model)
    shapes = ((1, _TOKENS, _HEADS, head_dim), (1, _TOKENS, 1, head_dim))
    inputs = [_random_input(shape, model, dtype, seed) for seed, shape in enumerate(shapes)]

    def rotate(function: Forward, angles: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        # Copy the inputs, because a kernel may overwrite them. As in the layer, queries and keys
        # are transposed views.
        queries, keys = ((x * 1).transpose(1, 2) for x in inputs)
        return list(function(queries, keys, *angles))

    def fused(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotated: tuple[torch.Tensor, torch.Tensor] = kernels.rotary(q, k, cos, sin)
        return rotated

    for angles in _angles(model, dtype):
        layer_results = _with_gradients(partial(rotate, apply_rotary, angles), inputs)
        kernel_results = _with_gradients(partial(rotate, fused, angles), inputs)
        if problem := _describe_difference(kernel_results, layer_results, dtype):
            return problem
    return types.FunctionType(
        class_forward.__code__,
        {**class_forward.__globals__, ROTARY_FUNCTION: fused},
        class_forward.__name__,
        class_forward.__defaults__,
        class_forward.__closure__,
    )


def _angles(model: nn.Module, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the cosines and sines of the model's rotary embeddings. The list has one pair for each
    type of layer (such as full and sliding attention).
    """
    device = next(model.parameters()).device
    embedding = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
    dummy = torch.zeros(1, _TOKENS, 8, dtype=dtype, device=device)
    positions = torch.arange(3, 3 + _TOKENS, device=device).unsqueeze(0)
    if "layer_type" not in inspect.signature(embedding.forward).parameters:
        return [embedding(dummy, positions)]
    config: Any = model.config
    layer_types = dict.fromkeys(config.get_text_config().layer_types)
    return [embedding(dummy, positions, layer_type) for layer_type in layer_types]


_FUSED_FORWARDS: dict[str, Callable[[nn.Module, nn.Module, Kernels], Forward | str]] = {
    "norm": _fused_norm,
    "mlp": _fused_mlp,
    "rotary": _fused_rotary,
}


# --- the comparison of a kernel with a layer


def _weight_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's floating-point weights, in which the model computes."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _random_input(
    shape: Sequence[int], model: nn.Module, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    """Return normal random numbers. They come from a separate generator, so that the random numbers
    of the run do not change.
    """
    device = next(model.parameters()).device
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype).requires_grad_()


def _first_equal_forward(
    module: nn.Module, forwards: Sequence[Forward], shape: Sequence[int], dtype: torch.dtype
) -> Forward | str:
    """Return the first of ``forwards`` that computes the same as ``module``. If there is none,
    return a text that states the smallest difference.
    """
    x = _random_input(shape, module, dtype)
    layer_results = _with_gradients(lambda: [module(x)], [x])
    problems = []
    for forward in forwards:
        kernel_results = _with_gradients(partial(_as_list, forward, module, x), [x])
        problem = _describe_difference(kernel_results, layer_results, dtype)
        if problem is None:
            return forward
        problems.append(problem)
    return min(problems)


def _as_list(function: Forward, *inputs: Any) -> list[torch.Tensor]:
    return [function(*inputs)]


@torch.enable_grad()
def _with_gradients(
    function: Callable[[], list[torch.Tensor]], inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return the outputs of ``function``, followed by the gradients of ``inputs``. The backward
    pass begins with random gradients of the outputs, which are the same in every call.
    """
    outputs = function()
    generator = torch.Generator().manual_seed(7)
    output_gradients = [
        torch.randn(y.shape, generator=generator).to(y.device, y.dtype) for y in outputs
    ]
    output_copies = [y.detach().clone() for y in outputs]
    return [*output_copies, *torch.autograd.grad(outputs, list(inputs), output_gradients)]


def _describe_difference(
    kernel_results: Sequence[torch.Tensor],
    layer_results: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> str | None:
    """Compare two results. Returns None if they differ by no more than rounding. Otherwise returns
    a text that states the difference.
    """
    limit = max(_MIN_RELATIVE_ERROR, MAX_ROUNDING_ERRORS * torch.finfo(dtype).eps)
    for actual, expected in zip(kernel_results, layer_results, strict=True):
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return (
                f"the kernel's result is {actual.dtype} {tuple(actual.shape)}, not "
                f"{expected.dtype} {tuple(expected.shape)}"
            )
        expected_norm = float(expected.float().norm())
        distance = float((actual.float() - expected.float()).norm())
        # ``not distance <=`` is also True for NaN. An output of only zeros cannot be compared.
        if not distance <= limit * expected_norm or expected_norm == 0:
            relative = distance / max(expected_norm, 1e-30)
            return (
                f"the kernel's result differs by {relative:.2g} relative to the layer's result "
                f"({dtype})"
            )
    return None

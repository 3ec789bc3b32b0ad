"""Inference only: the layer's last linear and the attention's output projection, two in a row, become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .families import find_model

FOLD = "_gspn2_fold"
# Sizes of map whose product is kept: the stages of one large picture.
MAPS = 8


def fuse_gspn2(pipe_or_model: Any) -> int:
    """Folds each GSPN-2 layer's `scan_out` with the attention's `to_out[0]`, for inference; as diffusers'
    `fuse_qkv_projections`, it is asked for and undone by `unfuse_gspn2`.

    No parameter, buffer or state_dict key changes. The product of the two weights is kept for each size of map and made
    again when either weight changes. A layer runs unfused by itself, in that call, where folding would be wrong: with
    gradients, under `torch.compile`, while `to_out[0]` is wrapped (LoRA) or hooked, and in joint attention or with an
    IP-Adapter, where something is added between the two. Results agree within rounding.

    Returns:
        The number of layers that will fold.

    Raises:
        TypeError: the pipeline or model is not supported.
    """
    model = find_model(pipe_or_model)
    unfuse_gspn2(model)
    count = 0
    for module in model.modules():
        layer, to_out = getattr(module, "gspn2", None), getattr(module, "to_out", None)
        if not isinstance(layer, nn.Module) or not isinstance(to_out, nn.ModuleList):
            continue
        linear = to_out[0]
        # Offloading, layerwise casting and sharding put their own forward there.
        if type(linear) is nn.Linear and "forward" not in vars(linear) and "forward" not in vars(layer):
            fold = _Fold(to_out, layer, linear)
            linear.forward, layer.forward = fold.project, fold.mix  # type: ignore[assignment, method-assign]
            object.__setattr__(layer, FOLD, fold)
            count += 1
    return count


def unfuse_gspn2(pipe_or_model: Any) -> None:
    """Undoes `fuse_gspn2`. Nothing to undo is fine.

    Raises:
        TypeError: the pipeline or model is not supported.
    """
    for layer in find_model(pipe_or_model).modules():
        fold = vars(layer).pop(FOLD, None)
        if fold is not None:
            for module, ours in ((layer, fold.mix), (fold.linear, fold.project)):
                if vars(module).get("forward") == ours:
                    del module.forward
                elif vars(module).get("_old_forward") == ours:  # an offloading hook came on top
                    module._old_forward = type(module).forward.__get__(module)


def folded_weights(model: nn.Module) -> list[Tensor]:
    """The products that `fuse_gspn2` keeps; they are in no state dict."""
    folds = [vars(module)[FOLD] for module in model.modules() if FOLD in vars(module)]
    return [weight for fold in folds for weight in fold.weights.values()]


class _Fold:
    """Stands for the forward of a layer (`mix`) and of the projection after it (`project`).

    `mix` does the work of both and remembers its result; `project` lets exactly that tensor pass.
    """

    def __init__(self, to_out: nn.ModuleList, layer: Any, linear: nn.Linear) -> None:
        self.to_out, self.layer, self.linear = to_out, layer, linear
        self.done: Tensor | None = None
        self.key: Any = None
        self.weights: dict[tuple[int, int], Tensor] = {}

    def mix(self, hidden_states: Tensor, height: int, width: int, **options: Any) -> Tensor:
        if not self.applies(hidden_states, options):
            return type(self.layer).forward(self.layer, hidden_states, height, width, **options)
        scanned = self.layer.scan(hidden_states, height, width)
        # One product with its bias, also where the features come first.
        done = F.linear(scanned.flatten(0, 1), self.folded_weight(height, width), self.linear.bias)
        self.done = done.unflatten(0, scanned.shape[:2])
        return self.done

    def project(self, hidden_states: Tensor) -> Tensor:
        done, self.done = self.done, None
        return hidden_states if hidden_states is done else F.linear(hidden_states, self.linear.weight, self.linear.bias)

    def applies(self, hidden_states: Tensor, options: dict[str, Any]) -> bool:
        linear, scan_out = self.linear, self.layer.scan_out
        return (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and self.to_out[0] is linear
            and type(scan_out) is nn.Linear
            and "forward" not in vars(scan_out)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (linear, scan_out))
            and linear.weight.dtype == scan_out.weight.dtype
            and linear.weight.device == scan_out.weight.device == hidden_states.device
            and hidden_states.device.type != "meta"
            and options.get("text") is None
            and options.get("added") is None
            and len(options.get("segments") or ()) <= 1
        )

    def folded_weight(self, height: int, width: int) -> Tensor:
        """(C_out, K * D) for a map, made in float32. Reading versions and addresses asks nothing of the device."""
        weights = (self.linear.weight, self.layer.scan_out.weight)
        key = [(w.data_ptr(), 0 if w.is_inference() else w._version, w.device, w.dtype) for w in weights]
        if key != self.key or len(self.weights) > MAPS:
            self.weights, self.key = {}, key
        rows = getattr(self.layer, "rows", None)
        sides = (height if rows is None else rows.height, width)
        if sides not in self.weights:
            folded = weights[0].float() @ self.layer.scaled_out_weight(height, width).float()
            self.weights[sides] = folded.to(weights[0].dtype)
        return self.weights[sides]

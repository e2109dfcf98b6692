# SPDX-License-Identifier: Apache-2.0
"""ScaledAdam: Adam whose steps are relative to the size of each parameter, and which learns that size too.

For a tensor p with root mean square r, gradient g and step t:

    v <- b2 v + (1 - b2) g^2                       d = -lr max(r, min_rms) g / (sqrt(v / (1 - b2^(t+1))) + eps)
    m <- b1 m + (1 - b1) (d + p s)                 p <- p + m

where s is 0 except at every fourth step, when r is measured again: there s is Adam's step for log r, whose gradient is
sum(p g), at most 0.1 in size. Tensors of one element have no r; their rate is ``scalar_lr_scale`` times that of the
others. A common factor of all gradients has no effect except through eps.

Every 100 steps the median of the norms of all r g in those steps sets a limit, ``clipping_scale`` times the median;
after 10, 20 and 40 steps, twice that. A step whose norm exceeds the limit scales its gradients down to it; one whose
norm is not finite uses none of its gradients. The first 10 steps have no limit.

Yao et al., "Zipformer" (2024), section 3.5. Parameters may be sharded by FSDP2: sums over a tensor are then
reduced over the shards, all tensors of the model at once.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastasr.asr.recipe.parallel import local

SIZE_PERIOD = 4  # steps between changes of size
CLIPPING_PERIOD = 100  # steps over which the median is taken
EARLY_ESTIMATES = (10, 20, 40)  # earlier steps at which a median is taken; the limit is then twice as large
MAX_SIZE_STEP = 0.1


class ScaledAdam(torch.optim.Optimizer):
    """The optimizer of the formulas above. ``params`` are parameters; for parameter groups, make one optimizer each.

    Args:
        lr: step relative to a tensor's root mean square. betas, eps: b1, b2 and eps.
        clipping_scale: the limit of the gradients' norm over its median; None uses the gradients as they are.
        scalar_lr_scale: rate of tensors of one element, and of sizes, over ``lr``.
        param_min_rms, param_max_rms: smallest r that a step is relative to, below which sizes do not change; largest r
            that a change of size may reach.
        scalar_max: limit of the absolute value of a tensor of one element.
    Raises:
        ValueError: ``lr`` or ``betas`` are out of range, or there is more than one group.
        RuntimeError: in ``step``, if half of the gradients' norms are not finite.
    """

    _flat = None

    def __init__(
        self,
        params: Any,
        lr: float = 0.03,
        clipping_scale: float = 2.0,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
    ) -> None:
        if lr < 0 or not 0 < betas[0] <= betas[1] < 1:
            raise ValueError(f"ScaledAdam: expected lr >= 0 and 0 < beta1 <= beta2 < 1, got {lr} and {betas}")
        defaults = {
            "lr": lr,
            "clipping_scale": clipping_scale,
            "betas": betas,
            "scalar_lr_scale": scalar_lr_scale,
            "eps": eps,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
            "step": 0,
        }
        super().__init__(params, defaults)
        if len(self.param_groups) != 1:
            raise ValueError(f"ScaledAdam: expected one group of parameters, got {len(self.param_groups)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        if self._flat is None or not self._flat.holds(self.state):
            self._flat = _Flat(group["params"], self.state)
        flat = self._flat
        flat.take_gradients()
        if group["step"] == 0:
            self._begin(group, flat)
        else:
            self._clip(group, flat)
        change = self._sizes(group, flat)
        self._move(group, flat, change)
        group["step"] += 1
        return loss

    def _begin(self, group: dict[str, Any], flat: "_Flat") -> None:
        group["rms"] = flat.rms()
        group["size_exp_avg_sq"] = torch.zeros_like(group["rms"])
        group["size_grads"] = group["rms"].new_zeros(SIZE_PERIOD, len(group["params"]))
        group["norms"] = group["rms"].new_zeros(CLIPPING_PERIOD)
        group["norm_threshold"] = None

    def _move(self, group: dict[str, Any], flat: "_Flat", change: Tensor | None) -> None:
        """Computes p <- p + m with the elements of all tensors in one row; flat.scales holds each tensor's factors."""
        beta1, beta2 = group["betas"]
        squares, moments = flat.buffers["exp_avg_sq"], flat.buffers["delta"]
        squares.mul_(beta2).addcmul_(flat.grad, flat.grad, value=1 - beta2)
        correction = 1 - beta2 ** (group["step"] + 1)
        root = correction**0.5 if correction < 0.99 else 1.0
        step = torch.sqrt(squares).add_(group["eps"] * root)
        torch.div(flat.grad, step, out=step)
        moments.mul_(beta1).addcmul_(step, flat.scales, value=-(1 - beta1) * group["lr"] * root)
        if change is not None:
            torch._foreach_add_(
                flat.views["delta"], torch._foreach_mul(flat.params, list((change * (1 - beta1)).unbind()))
            )
        torch._foreach_add_(flat.params, flat.views["delta"])
        for p in flat.scalars:
            p.clamp_(-group["scalar_max"], group["scalar_max"])

    def _sizes(self, group: dict[str, Any], flat: "_Flat") -> Tensor | None:
        """Returns the relative change of each tensor's size, (tensors,), at every fourth step, else None."""
        step, rms, is_scalar = group["step"], group["rms"], flat.is_scalar
        turn = step % SIZE_PERIOD
        group["size_grads"][turn] = flat.sums(flat.rows(), flat.grads)
        last = turn == SIZE_PERIOD - 1
        if last:
            rms.copy_(flat.rms())
        if last or flat.scales is None:
            flat.set_scales(
                torch.where(is_scalar, group["scalar_lr_scale"], rms.clamp(min=group["param_min_rms"]))
            )
        if not last:
            return None
        beta = group["betas"][1] ** SIZE_PERIOD
        square = group["size_exp_avg_sq"]
        square.mul_(beta).add_(group["size_grads"].square().mean(dim=0), alpha=1 - beta)
        correction = 1 - beta ** ((step + 1) // SIZE_PERIOD)
        rate = -group["lr"] * group["scalar_lr_scale"] * correction**0.5
        change = rate * group["size_grads"].sum(dim=0) / (square.sqrt() + group["eps"])
        change = change.masked_fill(rms < group["param_min_rms"], 0.0).clamp(-MAX_SIZE_STEP, MAX_SIZE_STEP)
        change = torch.minimum(change, (group["param_max_rms"] - rms) / rms)
        return change.masked_fill(is_scalar, 0.0)

    def _clip(self, group: dict[str, Any], flat: "_Flat") -> None:
        if group["clipping_scale"] is None:
            return
        step, norms = group["step"], group["norms"]
        weights = torch.where(flat.is_scalar, group["scalar_lr_scale"], group["rms"])
        norm = (flat.sums(flat.grads, flat.grads) * weights.square()).sum().sqrt()
        norms[step % CLIPPING_PERIOD] = norm
        if step % CLIPPING_PERIOD == 0 or step in EARLY_ESTIMATES:
            known = norms.sort().values
            early = step in EARLY_ESTIMATES
            known = known[-step:] if early else known
            median = float(known[min(len(known) - 1, len(known) // 4 * 2)])
            if median != median or median == float("inf"):
                raise RuntimeError(f"ScaledAdam: half of the gradients up to step {step} are not finite")
            group["norm_threshold"] = group["clipping_scale"] * median * (2 if early else 1)
        if group["norm_threshold"] is None:
            return
        factor = group["norm_threshold"] / (float(norm) + 1e-20)
        if factor != factor or factor == 0:  # a gradient is not finite: this step uses none
            flat.grad.zero_()
        elif factor < 1:
            flat.grad.mul_(factor)


class _Flat:
    """Buffers with the gradients and moments of all tensors (their local shards) in one row, because a step over 300
    separate small tensors spends its time on calls. ``state[p]["exp_avg_sq"]`` and ``["delta"]`` are views of them.
    """

    def __init__(self, parameters: list[Tensor], state: Any) -> None:
        self.parameters = parameters
        self.params = [local(p) for p in parameters]
        device = self.params[0].device
        self.counts = [p.numel() for p in self.params]
        self.sizes = torch.tensor([p.numel() for p in parameters], device=device, dtype=torch.int64)
        self.is_scalar = self.sizes == 1
        self.scalars = [q for p, q in zip(parameters, self.params, strict=True) if p.numel() == 1]
        self.sharded = torch.tensor(
            [isinstance(p, DTensor) for p in parameters], device=device, dtype=torch.bool
        )
        self.is_sharded = any(isinstance(p, DTensor) for p in parameters)
        self.grad = torch.empty(sum(self.counts), device=device, dtype=torch.float32)
        self.grads = self.grad.split(self.counts)
        self.lengths = torch.tensor(self.counts, device=device, dtype=torch.int64)
        self.scales: Any = None
        self.buffers, self.views, self._states = {}, {}, []
        for name in ("exp_avg_sq", "delta"):
            buffer = torch.zeros_like(self.grad)
            views = self._views(buffer)
            for p, view in zip(parameters, views, strict=True):
                if name in state[p]:
                    view.copy_(local(state[p][name]))
                state[p][name] = _sharded_as(p, view)
                self._states.append((p, name, state[p][name]))
            self.buffers[name], self.views[name] = buffer, views

    def _views(self, buffer: Tensor) -> list[Tensor]:
        parts = buffer.split(self.counts)
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def holds(self, state: Any) -> bool:
        """Says whether the state's tensors are still views of these buffers. Those of a loaded state are not."""
        return all(state[p].get(name) is tensor for p, name, tensor in self._states)

    def take_gradients(self) -> None:
        grads = [
            q.new_zeros(q.numel()) if p.grad is None else local(p.grad).reshape(-1).float()
            for p, q in zip(self.parameters, self.params, strict=True)
        ]
        torch.cat(grads, out=self.grad)

    def set_scales(self, scales: Any) -> None:
        self.scales = scales.repeat_interleave(self.lengths, output_size=self.grad.numel())

    def rms(self) -> Tensor:
        rows = self.rows()
        return (self.sums(rows, rows) / self.sizes).sqrt()

    def rows(self) -> list[Tensor]:
        """Returns the parameters, each flattened."""
        return [p.reshape(-1).float() for p in self.params]

    def sums(self, one: list[Tensor], other: list[Tensor]) -> Tensor:
        """Returns each tensor's sum of products, (tensors,), over all shards. The arguments are lists like ``rows()``
        and ``grads``."""
        sums = torch.stack([torch.dot(a, b) for a, b in zip(one, other, strict=True)])
        if self.is_sharded:
            parts = sums.masked_fill(~self.sharded, 0.0)
            mesh = next(p for p in self.parameters if isinstance(p, DTensor)).device_mesh
            dist.all_reduce(parts, group=mesh.get_group())
            sums = torch.where(self.sharded, parts, sums)
        return sums


def _sharded_as(parameter: Tensor, x: Tensor) -> Tensor:
    """Makes the local shard x a sharded tensor with the sharding of ``parameter``."""
    if not isinstance(parameter, DTensor):
        return x
    return DTensor.from_local(
        x,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

# SPDX-License-Identifier: Apache-2.0
"""ScaledAdam: Adam whose steps are relative to the size of each parameter, and which learns that size too.

For a tensor p with root mean square r, gradient g and step t:

    v <- b2 v + (1 - b2) g^2                       d = -lr max(r, min_rms) g / (sqrt(v / (1 - b2^(t+1))) + eps)
    m <- b1 m + (1 - b1) (d + p s)                 p <- p + m

and every fourth step s, else 0, is Adam's step for log r: its gradient is sum(p g). Tensors of one element have
no r; their rate is ``scalar_lr_scale`` times the others'. Gradients are scaled down to ``clipping_scale`` times
the median, over 100 steps, of their norm, in which g counts r times. A common factor of all gradients changes
nothing but for eps.

Yao et al., "Zipformer" (2024), section 3.5. Parameters may be sharded by FSDP2: sums over a tensor are then
reduced over the shards, all tensors of the model at once.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

SIZE_PERIOD = 4  # steps between changes of size
CLIPPING_PERIOD = 100  # steps of which the median is taken
EARLY_ESTIMATES = (10, 20, 40)  # steps at which it is taken before that, and doubled
MAX_SIZE_STEP = 0.1


class ScaledAdam(torch.optim.Optimizer):
    """Arguments as above. ``params`` are parameters; groups are not supported: give each its own optimizer."""

    def __init__(
        self,
        params,
        lr=0.03,
        clipping_scale=2.0,
        betas=(0.9, 0.98),
        scalar_lr_scale=0.1,
        eps=1e-8,
        param_min_rms=1e-5,
        param_max_rms=3.0,
        scalar_max=10.0,
    ):
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
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        sizes = [p.numel() for p in group["params"]]
        is_scalar = torch.tensor([size == 1 for size in sizes])
        params = [_local(p) for p in group["params"]]
        grads = [_local(torch.zeros_like(p) if p.grad is None else p.grad).float() for p in group["params"]]
        is_scalar, sizes = is_scalar.to(params[0].device), torch.tensor(sizes, device=params[0].device)
        if group["step"] == 0:
            self._begin(group, params, sizes)
        else:
            self._clip(group, grads, is_scalar)
        deltas = self._adam(group, grads)
        scales, sizes_step = self._sizes(group, params, grads, is_scalar, sizes)
        torch._foreach_mul_(deltas, list(scales.unbind()))
        if sizes_step is not None:
            torch._foreach_add_(deltas, torch._foreach_mul(params, list(sizes_step.unbind())))
        moments = [_local(self.state[p]["delta"]) for p in group["params"]]
        torch._foreach_lerp_(moments, deltas, 1 - group["betas"][0])
        torch._foreach_add_(params, moments)
        for p, size in zip(params, sizes.tolist(), strict=True):
            if size == 1:
                p.clamp_(-group["scalar_max"], group["scalar_max"])
        group["step"] += 1
        return loss

    def _begin(self, group, params, sizes):
        for p in group["params"]:
            self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            self.state[p]["delta"] = torch.zeros_like(p, dtype=torch.float32)
        group["rms"] = self._rms(group, params, sizes)
        group["size_exp_avg_sq"] = torch.zeros_like(group["rms"])
        group["size_grads"] = group["rms"].new_zeros(SIZE_PERIOD, len(params))
        group["norms"] = group["rms"].new_zeros(CLIPPING_PERIOD)
        group["norm_threshold"] = None

    def _adam(self, group, grads):
        beta2, step = group["betas"][1], group["step"]
        squares = [_local(self.state[p]["exp_avg_sq"]) for p in group["params"]]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        correction = 1 - beta2 ** (step + 1)
        denominators = torch._foreach_sqrt(squares)
        if correction < 0.99:
            torch._foreach_mul_(denominators, correction**-0.5)
        torch._foreach_add_(denominators, group["eps"])
        return torch._foreach_div(torch._foreach_mul(grads, -group["lr"]), denominators)

    def _sizes(self, group, params, grads, is_scalar, sizes):
        """What each tensor's step is multiplied by, and the relative change of its size, both (tensors,)."""
        step, rms = group["step"], group["rms"]
        turn = step % SIZE_PERIOD
        group["size_grads"][turn] = self._sums(group, torch._foreach_mul(params, grads))
        last = turn == SIZE_PERIOD - 1
        if last:
            rms.copy_(self._rms(group, params, sizes))
        scales = torch.where(is_scalar, group["scalar_lr_scale"], rms.clamp(min=group["param_min_rms"]))
        if not last:
            return scales, None
        beta = group["betas"][1] ** SIZE_PERIOD
        square = group["size_exp_avg_sq"]
        square.mul_(beta).add_(group["size_grads"].square().mean(dim=0), alpha=1 - beta)
        correction = 1 - beta ** ((step + 1) // SIZE_PERIOD)
        rate = -group["lr"] * group["scalar_lr_scale"] * correction**0.5
        change = rate * group["size_grads"].sum(dim=0) / (square.sqrt() + group["eps"])
        change = change.masked_fill(rms < group["param_min_rms"], 0.0).clamp(-MAX_SIZE_STEP, MAX_SIZE_STEP)
        change = torch.minimum(change, (group["param_max_rms"] - rms) / rms)
        return scales, change.masked_fill(is_scalar, 0.0)

    def _clip(self, group, grads, is_scalar):
        if group["clipping_scale"] is None:
            return
        step, norms = group["step"], group["norms"]
        weights = torch.where(is_scalar, group["scalar_lr_scale"], group["rms"])
        squares = self._sums(group, torch._foreach_mul(grads, grads))
        norm = (squares * weights.square()).sum().sqrt()
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
        if factor != factor or factor == 0:  # a gradient that is not finite: this step goes on without
            torch._foreach_zero_(grads)
        elif factor < 1:
            torch._foreach_mul_(grads, factor)

    def _rms(self, group, params, sizes):
        return (self._sums(group, torch._foreach_mul(params, params)) / sizes).sqrt()

    def _sums(self, group, tensors):
        """The sum of each tensor (tensors,), over all shards."""
        sums = torch.stack([t.float().sum() for t in tensors])
        sharded = [isinstance(p, DTensor) for p in group["params"]]
        if any(sharded):
            mask = torch.tensor(sharded, device=sums.device)
            parts = sums.masked_fill(~mask, 0.0)
            mesh = next(p for p in group["params"] if isinstance(p, DTensor)).device_mesh
            dist.all_reduce(parts, group=mesh.get_group())
            sums = torch.where(mask, parts, sums)
        return sums


def _local(x):
    return x.to_local() if isinstance(x, DTensor) else x

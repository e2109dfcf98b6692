# SPDX-License-Identifier: Apache-2.0
"""Eden, the learning rate that goes with ScaledAdam.

    lr = base_lr (1 + (batch / lr_batches)^2)^(-1/4) (1 + (epoch / lr_epochs)^2)^(-1/4) w

where w grows from ``warmup_start`` to 1 over ``warmup_batches``. Yao et al., "Zipformer" (2024), section 4.1.
"""


def eden(
    base_lr: float,
    batch: float,
    epoch: int,
    lr_batches: float,
    lr_epochs: float,
    warmup_batches: float = 500.0,
    warmup_start: float = 0.5,
) -> float:
    """Returns the learning rate at step ``batch`` of the run, in epoch ``epoch``."""
    warmup = min(1.0, warmup_start + (1.0 - warmup_start) * batch / warmup_batches) if warmup_batches else 1.0
    return (
        base_lr * (1 + (batch / lr_batches) ** 2) ** -0.25 * (1 + (epoch / lr_epochs) ** 2) ** -0.25 * warmup
    )

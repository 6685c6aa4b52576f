"""Learning rates over a run."""

import torch


def warmup_cosine(step: int, num_steps: int, warmup_share: float) -> float:
    """Return the factor on the learning rate: a linear rise, then a cosine down to a tenth."""
    num_warmup = max(round(num_steps * warmup_share), 1)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = min((step - num_warmup) / max(num_steps - num_warmup, 1), 1.0)
    # In single precision: a run that goes on must go on to the last bit as it began.
    return 0.1 + 0.45 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi))))

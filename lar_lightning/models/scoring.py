"""Exact entropies of trajectories that somebody else sampled: one reading by the policy itself.

H_t = entropy of the distribution that predicts token t, from the hidden state at t - 1, in nats.
Only hidden states before action tokens are projected, a chunk at a time, so that no fp32 tensor of
(tokens x vocabulary) is alive beyond a chunk.

Dimensions: B trajectories, T positions, R rows before action tokens, D hidden units, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lar_lightning.errors import SettingError
from lar_lightning.models.student import check_plain_head
from lar_lightning.trajectories import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_PER_CHUNK = 1 << 24
"""Largest fp32 tensor of logits: 64 MiB."""


def load_scorer(checkpoint: Path) -> "PreTrainedModel":
    """Load the policy in the precision in which it acts, on the accelerator where there is one.

    Raises:
        SettingError: if the architecture changes logits behind its output matrix.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.eval()
    if torch.cuda.is_available():
        model.cuda()
    check_plain_head(model)
    return model


def scored(
    model: "PreTrainedModel", trajectories: Sequence[Trajectory], *, tokens_per_batch: int
) -> Iterator[Trajectory]:
    """Yield trajectories with exact entropies, the longest first: what does not fit fails at once.

    Args:
        model: The policy.
        trajectories: Of the policy's tokens.
        tokens_per_batch: Most positions that are read together, padding included; a longer
            trajectory is read alone.

    Raises:
        SettingError: if a token is outside the model's vocabulary.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    for trajectory in trajectories:
        if not 0 <= trajectory.token_ids.min() <= trajectory.token_ids.max() < num_rows:
            raise SettingError(
                f"tokens of {trajectory.trajectory_id} must be below {num_rows}, the rows of "
                f"`base_model`, got {trajectory.token_ids.max()}. Its tokenizer does not belong to "
                "its weights."
            )
    total = sum(len(trajectory.token_ids) for trajectory in trajectories)
    with tqdm(total=total, desc="entropies", unit="token", mininterval=1.0) as progress:
        for batch in _batches(trajectories, tokens_per_batch):
            for trajectory, entropies in zip(batch, entropies_of(model, batch), strict=True):
                yield replace(trajectory, entropies=entropies, entropy_kind="exact")
                progress.update(len(trajectory.token_ids))


def _batches(
    trajectories: Sequence[Trajectory], tokens_per_batch: int
) -> Iterator[list[Trajectory]]:
    """Put trajectories of like length together."""
    batch: list[Trajectory] = []
    for trajectory in sorted(trajectories, key=lambda t: len(t.token_ids), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].token_ids) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(trajectory)
    if batch:
        yield batch


@torch.inference_mode()
def entropies_of(
    model: "PreTrainedModel", trajectories: Sequence[Trajectory]
) -> list[Float[np.ndarray, " T"]]:
    """Return the entropy before each action token of each trajectory, NaN elsewhere.

    Sequences are padded on the right: what comes later does not reach a causal model's rows.
    """
    length = max(len(trajectory.token_ids) for trajectory in trajectories)
    ids = torch.zeros(len(trajectories), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    is_row = torch.zeros_like(ids, dtype=torch.bool)
    for index, trajectory in enumerate(trajectories):
        num_tokens = len(trajectory.token_ids)
        ids[index, :num_tokens] = torch.as_tensor(trajectory.token_ids)
        mask[index, :num_tokens] = 1
        for span in trajectory.action_spans:
            is_row[index, span.start - 1 : span.end - 1] = True
    device = model.device
    backbone = getattr(model, model.base_model_prefix)
    hidden = backbone(
        input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
    ).last_hidden_state[is_row.to(device)]
    head: Any = model.get_output_embeddings()
    entropies = torch.full(ids.shape, torch.nan)
    entropies[:, 1:][is_row[:, :-1]] = row_entropies(hidden, head).cpu()
    return [
        row[: len(trajectory.token_ids)].numpy()
        for row, trajectory in zip(entropies, trajectories, strict=True)
    ]


def row_entropies(hidden: Float[Tensor, "R D"], head: torch.nn.Linear) -> Float[Tensor, " R"]:
    """Project hidden states chunk by chunk and return the entropy of each row, in nats."""
    rows_per_chunk = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    return torch.cat([_entropies(head(rows).float()) for rows in hidden.split(rows_per_chunk)])


def _entropies(logits: Float[Tensor, "R V"]) -> Float[Tensor, " R"]:
    log_partition = logits.logsumexp(1)
    mean_logit = torch.linalg.vecdot((logits - log_partition[:, None]).exp_(), logits)
    return (log_partition - mean_logit).clamp_min(0)

"""The loop behind supervised fine-tuning: LoRA adapters on a frozen model, loss on answers only.

Base weights stay in bf16, adapters are trained in fp32. Where training was saved it goes on, with
the result that it would have had.

Dimensions: B samples, T positions.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lar_lightning.agents.supervised.samples import (
    EncodedSample,
    micro_batches,
    num_answer_tokens,
    padded,
    step_samples,
)
from lar_lightning.artefacts import replacing
from lar_lightning.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

SECONDS_BETWEEN_SAVES = 600.0
ROWS_PER_CHUNK = 1024
"""Answer tokens that are projected to the vocabulary together."""


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings:
    """How a model is fine-tuned; the defaults are TokenSkip's."""

    lora_rank: int = 8
    lora_alpha: float = 16
    learning_rate: float = 5e-5
    """At its height; it falls to 0 as a cosine."""
    warmup_share: float = 0.1
    """Share of all steps in which the learning rate rises."""
    num_epochs: int = 3
    batch_size: int = 8
    """Samples of a step."""
    max_length: int = 2048
    """Longest sample in tokens; longer ones are left out, as a cut answer would teach to cut."""
    validation_share: float = 0.1
    """Share of the groups of samples that the losses before and after are measured on."""
    seed: int = 42
    """Of the split and the order of training, and of what is drawn for the samples."""
    tokens_per_batch: int | None = None
    """Most positions that are read together, padding included; decides memory, not the result.
    None: 2,048 on a CPU, 8,192 on a card."""

    def __post_init__(self) -> None:
        least = {"lora_rank": 1, "num_epochs": 1, "batch_size": 1, "max_length": 2, "seed": 0}
        if self.tokens_per_batch is not None:
            least["tokens_per_batch"] = 1
        for name, value in least.items():
            if getattr(self, name) < value:
                raise SettingError(f"`{name}` must be at least {value}, got {getattr(self, name)}.")
        for name in ("lora_alpha", "learning_rate"):
            if not getattr(self, name) > 0:
                raise SettingError(f"`{name}` must be above 0, got {getattr(self, name)}.")
        for name in ("warmup_share", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(
                    f"`{name}` must lie in 0..1 without 1, got {getattr(self, name)}."
                )


def learning_rate_at(step: int, num_steps: int, settings: SupervisedSettings) -> float:
    """Return the learning rate of a step: a linear rise, then a cosine down to 0."""
    num_warmup = math.ceil(num_steps * settings.warmup_share)
    if step < num_warmup:
        return settings.learning_rate * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    return settings.learning_rate * (1 + math.cos(math.pi * done)) / 2


def answer_loss(model: Any, batch: Sequence[EncodedSample]) -> "Tensor":
    """Return the summed negative log-likelihood of the answers' tokens, in nats."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    ids, mask, targets = (tensor.to(model.device) for tensor in padded(batch))
    head: Any = model.get_output_embeddings()

    def loss_of(states: "Tensor", wanted: "Tensor") -> "Tensor":
        return cross_entropy(head(states).float(), wanted, reduction="sum")

    with _mixed_precision(model, head.weight.dtype):
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        counts = targets >= 0
        # Logits of a chunk are made again for its gradient: no more than a chunk's are ever alive.
        parts: list[Any] = [
            checkpoint(loss_of, states, wanted, use_reentrant=False)
            for states, wanted in zip(
                hidden[counts].split(ROWS_PER_CHUNK),
                targets[counts].split(ROWS_PER_CHUNK),
                strict=True,
            )
        ]
    return torch.stack(parts).sum()


class SupervisedTrainer:
    """A base model with adapters, and the loop that trains them."""

    def __init__(self, base: Path, settings: SupervisedSettings) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from lar_lightning.models.student import check_plain_head

        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model.eval()
        check_plain_head(model)
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
            target_modules="all-linear",
            lora_dropout=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.adapters: Any = get_peft_model(model, config)  # changes `model` in place
        self.model = model.cuda() if torch.cuda.is_available() else model
        self.settings = settings
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), weight_decay=0.0)

    @property
    def tokens_per_batch(self) -> int:
        """Most positions that are read together on this device."""
        on_device = 2048 if self.model.device.type == "cpu" else 8192
        return self.settings.tokens_per_batch or on_device

    def train(
        self,
        training: Sequence[EncodedSample],
        validation: Sequence[EncodedSample],
        path: Path,
        signature: str,
    ) -> tuple[float, float]:
        """Train from where `path` says, and return the validation loss before and after."""
        from tqdm import tqdm

        settings = self.settings
        first, before = self._restore(path, signature)
        before = self.loss(validation) if before is None else before
        steps_per_epoch = -(-len(training) // settings.batch_size)
        num_steps = steps_per_epoch * settings.num_epochs
        saved = time.monotonic()
        with tqdm(total=num_steps, initial=first, desc="fine-tuning", unit="step") as progress:
            for step in range(first, num_steps):
                chosen = step_samples(len(training), settings.batch_size, settings.seed, step)
                rate = learning_rate_at(step, num_steps, settings)
                loss = self.step([training[index] for index in chosen], rate)
                if not math.isfinite(loss):
                    raise SettingError(
                        f"the loss must be finite, got {loss} at step {step} of the fine-tuning. "
                        "Lower `learning_rate`."
                    )
                progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
                progress.update()
                is_epoch_over = (step + 1) % steps_per_epoch == 0
                if is_epoch_over or time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    self._save(path, signature, step + 1, before)
                    saved = time.monotonic()
        return before, self.loss(validation)

    def step(self, batch: Sequence[EncodedSample], learning_rate: float) -> float:
        """Train one step and return its loss before it."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        count = num_answer_tokens(batch)
        total = 0.0
        for part in micro_batches(batch, self.tokens_per_batch):
            loss = answer_loss(self.model, part) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        return total

    def loss(self, samples: Sequence[EncodedSample]) -> float:
        """Return the mean loss of an answer token, in nats."""
        import torch

        with torch.no_grad():
            batches = micro_batches(samples, self.tokens_per_batch)
            total = sum(answer_loss(self.model, batch).item() for batch in batches)
        return total / num_answer_tokens(samples)

    def merged(self) -> Any:
        """Return the plain model with adapters merged; the trainer ends here."""
        return self.adapters.merge_and_unload()

    def _save(self, path: Path, signature: str, step: int, before: float) -> None:
        import torch

        state = {
            "made_from": signature,
            "step": step,
            "loss_before": before,
            "adapters": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def _restore(self, path: Path, signature: str) -> tuple[int, float | None]:
        import torch

        if not path.exists():
            return 0, None
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["made_from"] != signature:
            return 0, None
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["adapters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        print(f"fine-tuning: goes on from step {state['step']}", flush=True)
        return state["step"], state["loss_before"]


@contextmanager
def _mixed_precision(model: Any, dtype: Any) -> Iterator[None]:
    """Compute in the frozen weights' precision: what is trained is in fp32."""
    import torch
    from peft.helpers import disable_input_dtype_casting

    is_mixed = dtype == torch.bfloat16
    with ExitStack() as stack:
        stack.enter_context(
            torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=is_mixed)
        )
        if is_mixed:
            # An adapter's input would be widened to its weights first, and narrowed again at once.
            stack.enter_context(disable_input_dtype_casting(model))
        yield

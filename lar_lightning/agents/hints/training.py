"""ConciseHint-T: a hint whose embeddings are trained, as a checkpoint that stock engines serve.

The base model is frozen; trained are K input rows, one for each unit of the hint's text and
starting from it. They are served as K added tokens at E = gamma E_trained + (1 - gamma) E_text, so
a trained hint is a few more ids in a prompt, and nothing of ours is needed to run it.

Added tokens also need rows in the output matrix (whose tie with the input, if any, is dissolved),
but must not be written. Theirs is the mean of all base rows: its logit is the mean of all logits,
which is never the greatest, whatever the hidden state. So greedy decoding never writes one, and
sampling does with a probability of at most 1 / V each (Jensen's inequality), mostly far less.

Dimensions: K units of a hint, D hidden units, S positions.
"""

import gc
import json
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from lar_lightning.agents.hints.data import TrainingSequence, digest_of, training_sequences
from lar_lightning.agents.workshop import Prepared, Workshop
from lar_lightning.artefacts import replacing, replacing_folder, write_json
from lar_lightning.base_models import load_tokenizer, model_fingerprint
from lar_lightning.errors import SettingError
from lar_lightning.export.checkpoint import SOURCE_FILE, extended_model
from lar_lightning.models.embeddings import ExtendedEmbedding, LatentRows
from lar_lightning.models.prefixes import read
from lar_lightning.models.student import check_plain_head
from lar_lightning.tokenizer import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from lar_lightning.agents.concisehint import ConciseHint

HINT_TOKEN = "<|hint_{}|>"
VALIDATION_SHARE = 0.01


def trained_hint_units(tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Return the ids of a trained hint in the tokenizer of its checkpoint."""
    added = tokenizer.get_added_vocab()
    units: list[int] = []
    while (name := HINT_TOKEN.format(len(units))) in added:
        units.append(added[name])
    if not units:
        raise SettingError(
            "`methods.concisehint.is_trained` must be played on the checkpoint that its "
            "preparation makes, got one without hint tokens. Prepare the method first, or set it "
            "to false."
        )
    return tuple(units)


def prepare_trained_hint(settings: "ConciseHint", workshop: Workshop) -> Prepared:
    """Train a hint and write its checkpoint; what is there from the same settings is reused."""
    base_size = len(workshop.tokenizer)
    text_units = encode_text(workshop.tokenizer, settings.hint)
    hint_ids = range(base_size, base_size + len(text_units))
    sequences = training_sequences(settings, workshop, hint_ids)
    workshop.free()
    trained = HintTraining(settings, workshop, text_units, sequences).run()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine that serves the hint needs the room
    made_from = {**trained["settings"], "gamma": settings.gamma}
    target = workshop.folder / "served"
    source = target / SOURCE_FILE
    if source.exists() and json.loads(source.read_text(encoding="utf-8")) == made_from:
        print(f"concisehint: reused {target}", flush=True)
        return Prepared(agent=settings, checkpoint=target)
    with replacing_folder(target) as temporary:
        write_hint_checkpoint(
            workshop.checkpoint, trained["rows"], text_units, settings.gamma, temporary
        )
        write_json(temporary / SOURCE_FILE, made_from)
    print(f"concisehint: made {target}", flush=True)
    return Prepared(agent=settings, checkpoint=target)


class HintTraining:
    """Training of a hint's rows, which goes on from the last epoch that was finished."""

    def __init__(
        self,
        settings: "ConciseHint",
        workshop: Workshop,
        text_units: Sequence[int],
        sequences: Sequence[TrainingSequence],
    ) -> None:
        """Set aside a hundredth of the sequences to validate, at least one where there are two."""
        self.settings, self.seed = settings, workshop.seed
        self.base, self.base_size = workshop.checkpoint, len(workshop.tokenizer)
        self.text_units = list(text_units)
        self.path = workshop.folder / "hint_rows.pt"
        self.identity: dict[str, Any] = {
            "base_model": model_fingerprint(self.base),
            "text_units": self.text_units,
            "sequences": digest_of(sequences),
            "learning_rate": settings.learning_rate,
            "num_epochs": settings.num_epochs,
            "num_accumulated": settings.num_accumulated,
            "seed": self.seed,
        }
        order = self._order(len(sequences), 0)
        num_held_out = math.ceil(VALIDATION_SHARE * len(sequences))
        self.held_out = [sequences[index] for index in order[:num_held_out]]
        self.training = [sequences[index] for index in order[num_held_out:]] or self.held_out

    def run(self) -> dict[str, Any]:
        """Return the state after the last epoch: `rows`, `losses`, `settings` and more."""
        state = self._stored()
        if state is not None and state["num_done"] == self.settings.num_epochs:
            print(f"concisehint: reused {self.path}", flush=True)
            return state
        model, rows = load_with_rows(self.base, self.text_units, self.base_size)
        optimizer = torch.optim.AdamW(
            [rows.input_rows], lr=self.settings.learning_rate, weight_decay=0.0
        )
        if state is None:
            state = {"num_done": 0, "losses": [], "validation": [self._validate(model)]}
        else:
            with torch.no_grad():
                rows.input_rows.copy_(state["rows"])
            optimizer.load_state_dict(state["optimizer"])
        for epoch in range(state["num_done"], self.settings.num_epochs):
            state["losses"] += self._epoch(model, rows, optimizer, epoch)
            state["validation"].append(self._validate(model))
            state |= {
                "num_done": epoch + 1,
                "rows": rows.input_rows.detach().cpu().clone(),
                "optimizer": optimizer.state_dict(),
                "settings": self.identity,
            }
            self._store(state)
        return state

    def _epoch(
        self, model: Any, rows: LatentRows, optimizer: torch.optim.Optimizer, epoch: int
    ) -> list[float]:
        """Read all training sequences once, in the epoch's order; return the loss of each step."""
        size = self.settings.num_accumulated
        order = self._order(len(self.training), epoch + 1)
        num_steps = math.ceil(len(order) / size)
        losses = []
        for step in range(num_steps):
            batch = [self.training[index] for index in order[step * size : (step + 1) * size]]
            total = 0.0
            for sequence in batch:
                loss = sequence_loss(model, sequence, self.base_size) / len(batch)
                loss.backward()
                total += loss.item()
            share = 1 - (epoch * num_steps + step) / (self.settings.num_epochs * num_steps)
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * share
            torch.nn.utils.clip_grad_norm_(rows.input_rows, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        return losses

    @torch.no_grad()
    def _validate(self, model: Any) -> float:
        losses = [sequence_loss(model, each, self.base_size).item() for each in self.held_out]
        return sum(losses) / len(losses)

    def _order(self, num_sequences: int, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        return torch.randperm(num_sequences, generator=generator).tolist()

    def _stored(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        return state if state["settings"] == self.identity else None

    def _store(self, state: dict[str, Any]) -> None:
        with replacing(self.path) as temporary:
            torch.save(state, temporary)
        report = {key: state[key] for key in ("num_done", "losses", "validation", "settings")}
        write_json(self.path.with_suffix(".json"), report)
        print(
            f"concisehint: epoch {state['num_done']} of {self.settings.num_epochs}, "
            f"{state['losses'][-1]:.3f} nats a unit, validation {state['validation'][-1]:.3f}",
            flush=True,
        )


def load_with_rows(
    base: Path, text_units: Sequence[int], base_size: int
) -> tuple["PreTrainedModel", LatentRows]:
    """Load a base model, frozen, with input rows behind its vocabulary that start as a text's."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False).eval()
    check_plain_head(model)
    embedding = model.get_input_embeddings()
    rows = LatentRows(len(text_units), embedding.weight.shape[1]).to(embedding.weight.device)
    rows.output_rows.requires_grad_(False)
    with torch.no_grad():
        rows.input_rows.copy_(embedding.weight[list(text_units)])
    model.set_input_embeddings(ExtendedEmbedding(embedding, rows, base_size))
    return model, rows


def sequence_loss(model: Any, sequence: TrainingSequence, base_size: int) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the labelled units of a sequence, in nats."""
    head = model.get_output_embeddings()
    ids = torch.tensor([sequence.ids], device=head.weight.device)
    labels = torch.tensor(sequence.labels[1:], device=ids.device)
    hidden = read(model, ids, torch.ones_like(ids), first_trained=base_size)[0, :-1]
    is_counted = labels >= 0
    return cross_entropy(head(hidden[is_counted]).float(), labels[is_counted])


def blended_rows(
    trained: Float[Tensor, "K D"], text: Float[Tensor, "K D"], gamma: float
) -> Float[Tensor, "K D"]:
    """Return the rows of a hint at a strength from 0, the text, to 1, as trained."""
    return gamma * trained.float() + (1 - gamma) * text.float()


def write_hint_checkpoint(
    base: Path,
    trained: Float[Tensor, "K D"],
    text_units: Sequence[int],
    gamma: float,
    folder: Path,
) -> None:
    """Write the base model with a hint's tokens behind its vocabulary."""
    from transformers import AutoModelForCausalLM

    tokenizer = deepcopy(load_tokenizer(base))
    base_size = len(tokenizer)
    names: list[Any] = [HINT_TOKEN.format(index) for index in range(len(text_units))]
    num_added = tokenizer.add_tokens(names, special_tokens=True)
    assert num_added == len(text_units), "hint tokens have names that no base tokenizer has"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    text = model.get_input_embeddings().weight.detach()[list(text_units)]
    mean = model.get_output_embeddings().weight.detach()[:base_size].float().mean(0)
    model = extended_model(
        model, blended_rows(trained, text, gamma), mean.expand(len(text_units), -1), base_size
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

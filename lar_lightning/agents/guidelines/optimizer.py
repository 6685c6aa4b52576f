"""The model that makes ACON's guidelines better: its limits, and what it has written already."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lar_lightning.agents.guidelines.feedback import message_overhead
from lar_lightning.artefacts import write_json
from lar_lightning.base_models import context_length, load_tokenizer

if TYPE_CHECKING:
    from lar_lightning.agents.acon import Acon
    from lar_lightning.agents.workshop import Workshop


class Optimizer:
    """The model that writes feedback and guidelines; what it wrote once is kept in a file."""

    def __init__(self, agent: "Acon", workshop: "Workshop") -> None:
        """Find the model, and how long its prompts may be."""
        self.workshop = workshop
        self.name = agent.optimizer or workshop.base_model
        self.checkpoint, self.tokenizer = workshop.checkpoint, workshop.tokenizer
        if agent.optimizer:
            from lar_lightning.run_folder import base_checkpoint

            self.checkpoint = base_checkpoint(agent.optimizer)
            self.tokenizer = load_tokenizer(self.checkpoint)
        own = context_length(self.checkpoint) or agent.optimizer_model_len
        model_len = min(agent.optimizer_model_len, own)
        self.max_tokens = min(agent.optimizer_tokens, model_len // 3)
        self.room = model_len - self.max_tokens - message_overhead(self.tokenizer)
        """Most tokens of a prompt."""
        self.path = workshop.folder / "optimizer_answers.json"

    def write(self, prompts: Sequence[str]) -> list[str]:
        """Answer each prompt; those that were answered before are not asked again."""
        known: dict[str, str] = read_json(self.path)
        keys = [digest([self.name, self.max_tokens, prompt]) for prompt in prompts]
        new = {key: text for key, text in zip(keys, prompts, strict=True) if key not in known}
        if new:
            answers = self.workshop.write(self.checkpoint, list(new.values()), self.max_tokens)
            known |= dict(zip(new, answers, strict=True))
            write_json(self.path, known)
        return [known[key] for key in keys]


def digest(content: Any) -> str:
    """Return 16 hexadecimal digits that identify JSON-able content."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file holds, or nothing where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

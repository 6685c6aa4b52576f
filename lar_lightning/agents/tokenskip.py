"""TokenSkip (Xia et al. 2025, arXiv 2502.12067): thoughts with the less important words left out.

The model is fine-tuned on its own chains of thought, from which the least important words were
removed at a share that a number in the prompt names; then that number controls how much it leaves
out. In agents only the thought of each action is pruned, never tags, calls or answers, and the
actions of one episode are pruned at one ratio, so that what is read of earlier turns looks as it
will in play.

At inference the limit in tokens is that of all methods. The published script multiplies it by the
ratio, which cuts long answers and flatters the savings.
"""

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from lar_lightning.agents.agent import Session, TurnAgent
from lar_lightning.agents.pruning.importance import LLMLINGUA_2, check_importance
from lar_lightning.agents.supervised.trainer import SupervisedSettings
from lar_lightning.benchmarks.benchmark import Style
from lar_lightning.errors import SettingError

if TYPE_CHECKING:
    from lar_lightning.agents.workshop import Prepared, Workshop

REPORT_FILE = "tokenskip.json"
"""In the method's folder: ratios asked and achieved, what was kept of the episodes, losses."""


@dataclass(frozen=True, kw_only=True)
class TokenSkip(TurnAgent, SupervisedSettings):
    """A model that was taught to skip words of its thoughts."""

    name: ClassVar[str] = "tokenskip"

    style: Style = "cot"
    """In which episodes are collected and played."""
    ratio: float = 0.7
    """Share of a thought's tokens that is asked for; 1 asks for nothing."""
    ratios: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    """Which are trained; one is drawn for each episode."""
    delimiter: str = "<|eot_id|>"
    """Around the ratio at the end of the user's message; plain text to all but Llama 3."""
    importance: str = LLMLINGUA_2
    """What scores words: `llmlingua-2`, as published; the name or folder of another classifier of
    its kind; or `self-information`, the policy's own surprisal, a stand-in where the classifier
    cannot be had: say so beside its results."""
    is_protective: bool = False
    """A stronger variant: tags, tool names and digits stay in thoughts."""
    forced: tuple[str, ...] | None = None
    """Words that always stay. None, as published: `Step` and `:` for Llama 3, none for others."""
    keeps_digits: bool | None = None
    """Whether words with digits always stay. None, as published: for Llama 3 only."""
    keeps_failures: bool = False
    """Whether failed episodes are trained on too; for models that solve next to nothing."""
    max_samples: int = 10_000
    """Most tasks that are collected on, and most turns that are trained on."""
    max_thought_tokens: int = 500
    """Turns with a longer thought are not trained on."""

    def __post_init__(self) -> None:
        for ratio in (self.ratio, *self.ratios):
            if not 0 < ratio <= 1:
                raise SettingError(
                    "`methods.tokenskip.ratio` and `ratios` must lie above 0 and at most at 1, got "
                    f"{ratio}. They are the share of a thought that is kept: .7 removes 30 %."
                )
        if not self.ratios:
            raise SettingError("`methods.tokenskip.ratios` must hold at least one ratio, got none.")
        for name in ("max_samples", "max_thought_tokens"):
            if getattr(self, name) < 1:
                raise SettingError(
                    f"`methods.tokenskip.{name}` must be at least 1, got {getattr(self, name)}."
                )
        SupervisedSettings.__post_init__(self)

    @property
    def learns(self) -> bool:
        """It fine-tunes."""
        return True

    def prepare(self, workshop: "Workshop") -> "Prepared":
        """Collect thoughts, prune them, fine-tune; stages that are there are not made again."""
        from lar_lightning.agents.pruning.samples import made_from, make_samples, reused_samples
        from lar_lightning.agents.supervised.fine_tuning import fine_tune
        from lar_lightning.agents.workshop import Prepared
        from lar_lightning.artefacts import write_json

        signature = made_from(self, workshop)
        found = reused_samples(workshop.folder, signature)
        if found is None:
            check_importance(self.importance)
            found = make_samples(self, workshop, signature)
        samples, report = found
        settings = SupervisedSettings(
            **{field.name: getattr(self, field.name) for field in fields(SupervisedSettings)}
            | {"seed": self.seed + workshop.seed}
        )
        workshop.free()
        tuned = fine_tune(workshop.checkpoint, samples, workshop.folder, settings)
        training = {key: value for key, value in asdict(tuned).items() if key != "checkpoint"}
        write_json(workshop.folder / REPORT_FILE, {**report, **training})
        return Prepared(agent=self, checkpoint=tuned.checkpoint)

    def messages(self, session: Session) -> list[dict[str, str]]:
        """Return the task with the ratio at the end of the user's message."""
        return with_ratio(super().messages(session), self.ratio, self.delimiter)


def with_ratio(
    messages: list[dict[str, str]], ratio: float, delimiter: str
) -> list[dict[str, str]]:
    """Put a ratio below 1 behind the last user message; 1 is asked for by saying nothing."""
    if ratio >= 1:
        return messages
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    suffix = f"{delimiter}{ratio:g}{delimiter}"
    told = {**messages[last], "content": messages[last]["content"] + suffix}
    return [*messages[:last], told, *messages[last + 1 :]]

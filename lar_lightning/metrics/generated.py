"""What the student writes by itself: horizon, usage, speed, agreement, degeneration."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lar_lightning.metrics.generations import GeneratedSample, repeated_ngrams
from lar_lightning.metrics.held_out import MetricGroup
from lar_lightning.metrics.horizon import Horizon
from lar_lightning.metrics.rates import Ratio, Speed
from lar_lightning.metrics.usage import LatentUsage
from lar_lightning.segments import LatentVocabulary


class GeneratedMetrics(MetricGroup):
    """Metrics of generated samples."""

    def __init__(self, vocabulary: LatentVocabulary) -> None:
        """Start empty."""
        super().__init__()
        self.vocabulary = vocabulary
        self.horizon = Horizon()
        self.usage = LatentUsage(len(vocabulary))
        self.excess = Ratio()
        self.agreement = Ratio()
        self.identical = Ratio()
        self.repetition = Ratio()
        self.truncation = Ratio()
        self.length = Ratio()
        self.units_speed = Speed()
        self.tokens_speed = Speed()

    def update(self, samples: Sequence[GeneratedSample], seconds: float) -> None:
        """Count what this process has written, also where that is nothing."""
        units = [unit for sample in samples for unit in sample.units]
        tokens = [token for sample in samples for token in sample.tokens]
        codes = [self.vocabulary.encode(sample.tokens) for sample in samples]
        code = [unit for units_of_text in codes for unit in units_of_text]
        device = self.excess.device
        self.horizon.update(
            torch.tensor(self.vocabulary.lengths(units), dtype=torch.int64, device=device),
            num_prompt_units=sum(len(sample.prompt.units) for sample in samples),
            num_prompt_tokens=sum(sample.prompt.num_tokens for sample in samples),
        )
        self.usage.update(self._latents(code, device), self._latents(units, device))
        self.excess.update(len(units) - len(code), len(units))
        known = [s.agreement for s in samples if s.agreement is not None]
        self.agreement.update(sum(known), len(known))
        self.identical.update(sum(value == 1 for value in known), len(known))
        grams = [repeated_ngrams(sample.tokens) for sample in samples]
        self.repetition.update(sum(n for n, _ in grams), sum(n for _, n in grams))
        self.truncation.update(sum(not s.is_finished for s in samples), len(samples))
        self.length.update(len(tokens), len(samples))
        self.units_speed.update(len(units), seconds)
        self.tokens_speed.update(len(tokens), seconds)

    def values(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return the figures of all processes by name, and the histograms of usage.

        All processes must ask together. Agreement is 0 where no text of the teacher's is known.
        """
        usage = self.usage.compute()
        histograms = {name: usage.pop(name).tolist() for name in ("due", "taken")}
        figures = {
            **self.horizon.compute(),
            "adoption": usage["adoption"],
            "usage_perplexity": usage["usage_perplexity"],
            "num_used_latents": sum(count > 0 for count in histograms["taken"]),
            "excess_share": self.excess.compute(),
            "repetition": self.repetition.compute(),
            "truncated_share": self.truncation.compute(),
            "tokens_per_text": self.length.compute(),
            "agreement": self.agreement.compute(),
            "identical_share": self.identical.compute(),
            "expanded_tokens_per_second": self.tokens_speed.compute(),
            "units_per_second": self.units_speed.compute(),
        }
        return {name: float(value) for name, value in figures.items()}, histograms

    def _latents(self, units: Sequence[int], device: torch.device) -> Tensor:
        base = self.vocabulary.base_size
        latents = [unit - base for unit in units if self.vocabulary.is_latent(unit)]
        return torch.tensor(latents, dtype=torch.int64, device=device)

"""What training does to the horizon and to behaviour, on held-out trajectories."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from callbacks.periodic import Periodic
from lar_lightning.base_models import load_tokenizer
from lar_lightning.batches import DistillationBatch
from lar_lightning.errors import SettingError
from lar_lightning.losses.folding import RowTerms
from lar_lightning.metrics.generated import GeneratedMetrics
from lar_lightning.metrics.generations import (
    GenerationListener,
    GenerationPrompt,
    held_out_prompts,
    write_together,
)
from lar_lightning.metrics.held_out import HeldOutMetrics
from lar_lightning.metrics.records import (
    Source,
    UsageFiles,
    record,
    record_histogram,
    writes_files,
)
from lar_lightning.module import LatentActionModule
from lar_lightning.run_folder import base_checkpoint, trajectory_path, vocabulary_path
from lar_lightning.segments import LatentVocabulary
from lar_lightning.trajectories import read_trajectories, trajectory_files


class HorizonMetrics(Periodic):
    """Measures held-out trajectories at every validation, and short texts that the student writes.

    Metrics recorded, all over the rows of held-out trajectories:
        val/horizon_units: units in the loss (H_lat).
        val/horizon_tokens: base tokens that they stand for (H_eff).
        val/units_per_token: their ratio; 1 minus it is what acting in latents can save.
        val/horizon_reduction: that.
        val/reparameterization_rate: share of action tokens inside latents.
        val/prompt_units, val/prompt_tokens, val/prompt_reduction: the same of what is only read.
        val/expected_adoption: mean probability of the latent, among the units that begin alike,
            where it is due.
        val/usage_perplexity: how many latents the student uses evenly, by those probabilities.
        val/num_dead_latents: latents that are due and whose mean probability is below 5 %.
        val/num_absent_latents: latents that are due nowhere in these trajectories.
        val/row_agreement: share of rows whose likeliest token is the teacher's.
        val/loss_against_start: validation loss divided by that before the first step.

    Metrics recorded, over greedy texts of the student, before training, every
    `generate_every_n_steps` steps and after the last:
        gen/horizon_units, gen/horizon_tokens, gen/units_per_token, gen/horizon_reduction,
        gen/reparameterization_rate: as above, of what it writes.
        gen/prompt_units, gen/prompt_tokens, gen/prompt_reduction: of what stands before.
        gen/adoption: latents that it writes / latents in the code of the same text.
        gen/excess_share: share of its units beyond that code.
        gen/num_used_latents, gen/usage_perplexity: how many latents it writes, and how evenly.
        gen/agreement, gen/identical_share: share of the text before it parts from the teacher's
            greedy text, and share of texts that never do, up to the limit; where that is recorded.
        gen/repetition: share of runs of four tokens that stood in the text before.
        gen/truncated_share, gen/tokens_per_text: texts that the limit cut, and their length.
        gen/expanded_tokens_per_second, gen/units_per_second: of the sampler in training, which is
            slower than an engine; all processes together.
        gen/seconds: that training waited.

    Files, without W&B too: `run_dir/metrics/latent_usage.csv` and `.jsonl`. With several processes,
    batches that are read twice to give all equally many count twice.
    """

    def __init__(
        self, generate_every_n_steps: int = 100, num_prompts: int = 8, max_tokens: int = 64
    ) -> None:
        """Set up the callback.

        Args:
            generate_every_n_steps: Steps between texts of the student; 0 has none written. The
                prompts are decoded in one batch, so it costs `max_tokens` short forward passes and
                reading the prompts: some 15 s of one core for a model of 135M parameters.
            num_prompts: Held-out tasks that it writes for, shared among processes.
            max_tokens: Length of a text in expanded tokens.
        """
        for name, value, least in (
            ("generate_every_n_steps", generate_every_n_steps, 0),
            ("num_prompts", num_prompts, 1),
            ("max_tokens", max_tokens, 1),
        ):
            if value < least:
                raise SettingError(
                    f"`HorizonMetrics.{name}` must be at least {least}, got {value}."
                )
        super().__init__(generate_every_n_steps)
        self.num_prompts = num_prompts
        self.max_tokens = max_tokens
        self.loss_at_start: float | None = None
        self.prompts: list[GenerationPrompt] = []

    def _prepare(self, pl_module: LatentActionModule) -> None:
        """Make what depends on the vocabulary, which is mined after this callback is made."""
        if hasattr(self, "held_out"):
            return
        self.vocabulary = self.mined = LatentVocabulary.load(vocabulary_path(pl_module.run_dir))
        self.files = UsageFiles(pl_module.run_dir, self.vocabulary)
        self.held_out = HeldOutMetrics(len(self.vocabulary)).to(pl_module.device)
        self.generated = GeneratedMetrics(self.vocabulary).to(pl_module.device)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        self._prepare(pl_module)
        self.prompts = self._chosen_prompts(pl_module) if self.period else []
        if self.prompts:
            self.tokenizer = load_tokenizer(base_checkpoint(pl_module.base_model))

    def _chosen_prompts(self, pl_module: LatentActionModule) -> list[GenerationPrompt]:
        reason = None
        path = trajectory_path(pl_module.run_dir, "held_out")
        if getattr(pl_module.student, "is_sharded", False):
            reason = "the model is sharded, and its processes would write texts of other lengths"
        elif not trajectory_files(path):
            reason = f"there is no {path} to take prompts from"
        else:
            room = pl_module.student.max_length - self.max_tokens - self.vocabulary.longest
            prompts = held_out_prompts(
                read_trajectories(path),
                self.vocabulary,
                num_prompts=self.num_prompts,
                max_length=room,
            )
            if prompts:
                return prompts
            reason = f"no held-out prompt leaves room for {self.max_tokens} tokens"
        rank_zero_warn(f"HorizonMetrics: no texts are written in training: {reason}.")
        return []

    @override
    def act(self, trainer: L.Trainer, pl_module: LatentActionModule) -> None:
        """Have texts written, measure them, and show them to all who want to see them."""
        if not self.prompts:
            return
        self._follow(pl_module)
        with trainer.precision_plugin.forward_context():
            generation, own, seconds = write_together(
                pl_module.student,
                self.vocabulary,
                self.tokenizer,
                self.prompts,
                max_tokens=self.max_tokens,
                step=trainer.global_step,
                rank=trainer.global_rank,
                num_ranks=trainer.world_size,
            )
        self.generated.reset()
        self.generated.update(own, seconds)
        values, histograms = self.generated.values()
        if all(prompt.teacher_tokens is None for prompt in self.prompts):
            values = {k: v for k, v in values.items() if k not in ("agreement", "identical_share")}
        values["seconds"] = generation.seconds
        record(trainer, {f"gen/{name}": value for name, value in values.items()})
        self._keep_usage(trainer, "generated", histograms)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GenerationListener):
                callback.on_generation(trainer, pl_module, generation)

    def _follow(self, pl_module: LatentActionModule) -> None:
        """Speak the latents in play, which AbstractionSchedule changes."""
        number = pl_module.student.num_active
        if len(self.vocabulary) != number:
            self.vocabulary = self.mined.first(number)
            self.prompts = self._chosen_prompts(pl_module)
            self.generated = GeneratedMetrics(self.vocabulary).to(pl_module.device)

    def _keep_usage(
        self, trainer: L.Trainer, source: Source, histograms: dict[str, list[float]]
    ) -> None:
        if writes_files(trainer) and len(self.mined):
            rest = [0.0] * (len(self.mined) - len(histograms["taken"]))  # not in play
            histograms = {name: [*counts, *rest] for name, counts in histograms.items()}
            self.files.add(trainer.global_step, source, histograms)
            prefix = {"held_out": "val", "generated": "gen"}[source]
            record_histogram(trainer, f"{prefix}/latent_usage", histograms["taken"])

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, LatentActionModule)
        self._prepare(pl_module)
        self.held_out.reset()

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: DistillationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, LatentActionModule)
        terms: RowTerms = outputs
        self.held_out.update(pl_module.student, batch, terms)

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures, histograms = self.held_out.values()
        loss = float(self.held_out.loss.compute())
        values = {f"val/{name}": value for name, value in figures.items()}
        if trainer.sanity_checking and trainer.global_step > 0:
            return  # a resumed run has its start behind it
        self._keep_usage(trainer, "held_out", histograms)
        if trainer.sanity_checking:
            # Lightning's check before training reads all held-out trajectories: the loss at
            # initialisation.
            self.loss_at_start = loss
            for logger in trainer.loggers:
                logger.log_metrics({**values, "val/loss_nats": self.loss_at_start}, step=0)
            return
        if self.loss_at_start is not None:
            values["val/loss_against_start"] = loss / self.loss_at_start
        for name, value in values.items():
            pl_module.log(name, value, sync_dist=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"loss_at_start": self.loss_at_start}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss_at_start = state_dict["loss_at_start"]

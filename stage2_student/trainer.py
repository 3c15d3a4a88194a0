"""Training with `transformers.Trainer`: accelerate, bf16, checkpoints, resume and reporting work as people know them.

What differs: a step's means run over all its rows, whatever the ranks and accumulation steps (DESIGN §6), so the counts
are taken from all micro-batches of a step before the first of them is run; rows come in the order of their numbers; a
loss or gradient that is not finite stops the run before the optimiser's step, saves the state and names the documents.
Checkpoints are plain Hugging Face folders with safetensors, also of a model that FSDP2 has in shards, and appear whole
or not at all (`checkpoints`). Optimiser and random states, read only to resume, are Trainer's own files; it loads them
with `weights_only=True`, which unpickles no code.

Weights are float32 always. In bf16 the products are computed in bf16 (autocast, or FSDP2's policy), while weights,
optimiser states and the sums of gradients over ranks stay float32, so that small updates are not lost.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object, save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from shared.cache.reader import Cache
from shared.errors import TidecacheError
from stage2_student import checkpoints, insight, tidal
from stage2_student.batch import Batch, Collator
from stage2_student.config import GPU_WORKERS, TrainConfig
from stage2_student.dataset import Failure, OrFailure, TrainingRows
from stage2_student.evaluation import Share, evaluate
from stage2_student.losses import BatchLosses, Counts, total
from stage2_student.model import Student, TrainableStudent, save_student

NOT_FINITE_FILE = "not_finite.json"
NAMED = 16  # documents in the message of a run that stopped; all are in the file


def training_arguments(
    config: TrainConfig, out: Path, steps: int, report_to: Sequence[str] = (), evaluates: bool = False
) -> TrainingArguments:
    """Trainer's arguments for a configuration; `steps` optimiser steps in all; `evaluates`: there is a held-out cache."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.activation_checkpointing,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=math.ceil(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates and config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        report_to=list(report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_num_workers=loader_workers(config, torch.accelerator.is_available()),
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # every trained weight has a part in every loss
    )
    if arguments.n_gpu > 1:
        # Several GPUs belong to several processes (`accelerate launch`); nn.DataParallel cannot split a Batch.
        arguments._n_gpu = 1
    return arguments


def loader_workers(config: TrainConfig, on_gpu: bool) -> int:
    """Processes that prepare batches ahead of the step."""
    if config.workers >= 0:
        return config.workers
    return GPU_WORKERS if on_gpu else 0


def fsdp_wanted() -> bool:
    """Whether `accelerate launch` was told to shard the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class StudentTrainer(Trainer):
    """See the module. `trained` says in checkpoints how and from what the student was trained; `held_out`: whose draws it
    is evaluated on every `eval_steps` steps and at the end.
    """

    def __init__(
        self,
        student: Student,
        rows: TrainingRows,
        config: TrainConfig,
        arguments: TrainingArguments,
        trained: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback] = (),
        held_out: Cache | None = None,
    ) -> None:
        self.student = student
        self.train_config = config
        self.train_rows = rows
        self.trained = trained
        self.held_out = held_out
        self._staged: Path | None = None  # where a checkpoint is being written
        super().__init__(
            model=TrainableStudent(student.model, config),
            args=arguments,
            data_collator=OrFailure(Collator(student.mask_id, student.pad_id)),  # type: ignore[arg-type]  # no dict
            train_dataset=rows,
            eval_dataset=[],  # not None, as Trainer wants it; `evaluate` reads the held-out cache
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # the losses are sums over counts of the whole step
        self.model_accepts_loss_kwargs = True  # the same, as Trainer before 5.17 asks for it
        self._arithmetic = insight.Arithmetic.of(student)
        self._flops = 0.0  # of the micro-batch whose loss was computed last
        self._peak_flops: float | None = None
        self._tally = insight.Tally()
        self._micro: list[tuple[Tensor, tuple[str, ...]]] = []  # loss and documents of the step's micro-batches
        self._random: list[Tensor] = []  # the states that the step began with

    @property
    def progress(self) -> float:
        """Optimiser steps done over all steps."""
        return float(self.state.global_step / max(self.state.max_steps, 1))

    def create_accelerator_and_postprocess(self) -> None:
        """What `accelerate launch` asks for, with plain checkpoints and float32 sums under FSDP2."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if fsdp_wanted() and self.args.world_size > 1 and not self.is_fsdp_enabled:
            # On CPUs: accelerate leaves them out, though torch can shard there, too.
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True
        if not self.is_fsdp_enabled:
            return
        plugin = state.fsdp_plugin
        plugin.state_dict_config = plugin.optim_state_dict_config = None  # of the type that was set before
        plugin.set_state_dict_type("FULL_STATE_DICT")
        if self.train_config.precision == "bf16":
            from torch.distributed.fsdp import MixedPrecisionPolicy

            # Inputs are not cast: a batch holds timesteps and the teacher's likelihoods, which need float32.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

    def get_batch_samples(  # type: ignore[override]  # a Batch where Trainer has a dict
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Counts]:
        """The micro-batches of one optimiser step, and what its means divide by, over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        for failed in (batch for batch in batches if isinstance(batch, Failure)):
            raise TidecacheError(failed.message)
        self._tally.steps += bool(batches)
        self._micro.clear()
        self._random = [torch.get_rng_state()]
        if device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(device))
        counts = Counts.of(batches, self.train_config)
        both = torch.stack([counts.ce, counts.distill]).to(device)
        if self.args.world_size > 1:
            both = self.accelerator.reduce(both, reduction="sum")
        return batches, Counts(both[0], both[1])

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; DDP and FSDP average over ranks, so it is multiplied by them."""
        counts = num_items_in_batch or Counts.of([inputs], self.train_config)
        losses: BatchLosses = model(inputs, self.progress)
        loss = total(losses, counts, self.train_config)
        self._micro.append((loss.detach(), inputs.documents))
        self._flops = self._arithmetic.of_batch(inputs, self.train_config.block_size)
        self._tally.add(inputs, losses, counts, self._flops)
        loss = loss * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the whole step's gradient, before the optimiser's step: the same in all ranks, so all stop here.

        Raises:
            TidecacheError: it is not finite, as whenever any micro-batch's loss is not.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            self._stop_not_finite(float(norm))
        return norm

    def _stop_not_finite(self, norm: float) -> None:
        """Save the state before this step, and say which documents it had."""
        step = self.state.global_step + 1
        mine = [{"rank": self.args.process_index, "loss": float(loss), "documents": d} for loss, d in self._micro]
        micro = gather_object(mine) if self.args.world_size > 1 else mine
        bad = [m for m in micro if not math.isfinite(m["loss"])]
        what = f"the loss of step {step} is {bad[0]['loss']}" if bad else f"the gradient of step {step} is {norm}"
        names = list(dict.fromkeys(name for m in bad or micro for name in m["documents"]))
        out = Path(self.args.output_dir or ".")
        if self.args.should_save:
            out.mkdir(parents=True, exist_ok=True)
            described = {"step": step, "gradient_norm": str(norm), "micro_batches": micro}
            (out / NOT_FINITE_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        more = f" and {len(names) - NAMED} more (in {out / NOT_FINITE_FILE})" if len(names) > NAMED else ""
        raise TidecacheError(
            f"{what}: training stops before it changes a weight; its documents are {', '.join(names[:NAMED])}{more}; "
            f"{self._save_before_step()}; lower --learning-rate in a new run, or look for likelihoods out of range with "
            "`tidecache cache verify`"
        )

    def _save_before_step(self) -> str:
        """Write the checkpoint that this step began with, unless it is there; says what was done."""
        step = self.state.global_step
        parts = (getattr(p, "_local_tensor", p.detach()) for p in self.student.model.parameters())  # FSDP2: this rank's
        finite = torch.stack([torch.isfinite(part).all().float() for part in parts]).min()
        if self.args.world_size > 1:
            finite = self.accelerator.reduce(finite, reduction="sum") / self.args.world_size
        if float(finite) < 1.0:
            return "the weights before it are not finite either, so they were not saved"
        if not step:
            return "nothing was trained yet"
        checkpoint = Path(self.args.output_dir or ".") / f"checkpoint-{step}"
        if checkpoint.exists():
            return f"the state after step {step} is in {checkpoint}"
        torch.set_rng_state(self._random[0])
        if len(self._random) > 1:
            torch.cuda.set_rng_state(self._random[1], self.args.device)
        self._save_checkpoint(self.model_wrapped, None)
        return f"the state after step {step} was saved in {checkpoint}"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log line, with what `insight.numbers` says of the steps since the last one, over all ranks."""
        if "loss" in logs and self._tally.vector_F is not None:
            vector_F, seconds = self._tally.vector_F, self._tally.seconds()
            memory = torch.tensor([insight.peak_memory(self.args.device)], dtype=torch.float64, device=self.args.device)
            if self.args.world_size > 1:
                vector_F = self.accelerator.reduce(vector_F, reduction="sum")
                memory = self.accelerator.gather(memory)
            logs |= insight.numbers(vector_F, max(self._tally.steps, 1), seconds, self.peak_flops)
            logs["peak_memory_gib"] = float(memory.max()) / 2**30
            config = self.train_config
            if config.tidal != "none":
                progress = (self.state.global_step - 1) / max(self.state.max_steps, 1)
                schedule = (config.lambda_init, config.lambda_max, config.tidal_decay)
                logs["tidal_lambda"] = tidal.training_strength(progress, *schedule)
            self._tally = insight.Tally()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Quality on the held-out draws, a fixed set of masks: logged, and told to the callbacks."""
        assert self.held_out is not None
        config, student = self.train_config, self.student
        model: Any = self.model
        if self.is_fsdp_enabled:
            register_fsdp_forward_method(model, "answers")
        model.eval()
        share = (
            Share(self.args.process_index, self.args.world_size, gather_object) if self.args.world_size > 1 else None
        )
        with self.accelerator.autocast():
            found = evaluate(
                student, self.held_out, config.block_size, config.eval_documents, config.batch, str(self.args.device),
                config.block_start, model.answers, share,
            )  # fmt: skip
        metrics = found.metrics()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def peak_flops(self) -> float:
        """FLOP/s that MFU is measured against, of all ranks: as given, or measured once per run."""
        if self._peak_flops is None:
            dtype = torch.bfloat16 if self.train_config.precision == "bf16" else torch.float32
            given = self.train_config.peak_tflops * 1e12
            self._peak_flops = given or insight.measured_peak(self.args.device, dtype)
        return self._peak_flops * self.args.world_size

    def floating_point_ops(self, inputs: Batch) -> float:  # type: ignore[override]
        """Model FLOPs of the micro-batch whose loss was computed last, for Trainer's own total."""
        return self._flops

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """The dataset is in its final order already."""
        return SequentialSampler(self.train_rows)

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        return inputs.to(self.args.device)

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer writes a checkpoint's folder."""
        return str(self._staged or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and give it its name when it is whole."""
        out = Path(self.args.output_dir or ".")
        first = self.args.should_save
        with checkpoints.staged(out) if first else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()  # the folder is there
            self._staged = out / checkpoints.UNFINISHED
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staged = None
            self.accelerator.wait_for_everyone()  # all have written
            if first:
                checkpoints.publish(out / checkpoints.UNFINISHED / f"checkpoint-{self.state.global_step}", out)

    def save_result(self) -> None:
        """Write the trained student into the run's folder; every process must call this."""
        out = Path(self.args.output_dir or ".")
        with checkpoints.staged(out) if self.args.should_save else contextlib.nullcontext():
            result = out / checkpoints.UNFINISHED / "result"
            self.save_model(str(result))
            if self.args.should_save:
                checkpoints.move_result(result, out)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A plain Hugging Face folder, written by the first process; every process must call this."""
        state = None
        if self.is_fsdp_enabled:
            gathered = self.accelerator.get_state_dict(self.model)
            tied = set(getattr(self.student.model, "all_tied_weights_keys", None) or ())
            named = {name.removeprefix("model."): tensor for name, tensor in gathered.items()}
            state = {name: tensor for name, tensor in named.items() if name not in tied}
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            student = self.student
            save_student(student.model, student.tokenizer, folder, self.train_config, self.trained, state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer does, but under FSDP the optimiser's state alone: the weights are in `model.safetensors` already."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights are in the model already: `restore_student` put them there before any wrapper came around it."""

"""Training with `transformers.Trainer`: accelerate, bf16, checkpoints, resume and reporting work as people know them.

What differs: a step's means run over all its rows, whatever the ranks and accumulation steps (DESIGN §6), so the counts
are taken from all micro-batches of a step before the first of them is run; rows come in the order of their numbers; a
loss that is not finite stops the run and names the documents; the parts of the loss are logged. Checkpoints are plain
Hugging Face folders with safetensors. Optimiser and random states, read only to resume, are Trainer's own files; it
loads them with `weights_only=True`, which unpickles no code.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shared.errors import TidecacheError
from stage2_student import tidal
from stage2_student.batch import Batch, Collator
from stage2_student.config import TrainConfig
from stage2_student.dataset import Failure, OrFailure, TrainingRows
from stage2_student.losses import BatchLosses, Counts, total
from stage2_student.model import Student, TrainableStudent, TrainedFrom, input_and_output, restore_student, save_student

LOG_FILE = "train_log.jsonl"


def training_arguments(config: TrainConfig, out: Path, steps: int, report_to: Sequence[str] = ()) -> TrainingArguments:
    """Trainer's arguments for a configuration; `steps` optimiser steps in all."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=math.ceil(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        report_to=list(report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        # Several GPUs belong to several processes (`accelerate launch`); nn.DataParallel cannot split a Batch.
        arguments._n_gpu = 1
    return arguments


class StudentTrainer(Trainer):
    """See the module. `caches` names the caches in checkpoints."""

    def __init__(
        self,
        student: Student,
        rows: TrainingRows,
        config: TrainConfig,
        arguments: TrainingArguments,
        caches: Sequence[TrainedFrom],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.student = student
        self.train_config = config
        self.train_rows = rows
        self.trained_from = tuple(caches)
        super().__init__(
            model=TrainableStudent(student.model, config),
            args=arguments,
            data_collator=OrFailure(Collator(student.mask_id, student.pad_id)),  # type: ignore[arg-type]  # no dict
            train_dataset=rows,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # the losses are sums over counts of the whole step
        self.model_accepts_loss_kwargs = True  # the same, as Trainer before 5.17 asks for it
        self._body_parameters = _body_parameters(student)
        self._sums: dict[str, float] = {}
        self._steps = 0  # optimiser steps in `_sums`
        self._since = time.monotonic()

    @property
    def progress(self) -> float:
        """Optimiser steps done over all steps."""
        return float(self.state.global_step / max(self.state.max_steps, 1))

    def get_batch_samples(  # type: ignore[override]  # a Batch where Trainer has a dict
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Counts]:
        """The micro-batches of one optimiser step, and what its means divide by, over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        for failed in (batch for batch in batches if isinstance(batch, Failure)):
            raise TidecacheError(failed.message)
        self._steps += bool(batches)
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
        """This micro-batch's share of the step's loss; DDP averages over ranks, so it is multiplied by their number."""
        counts = num_items_in_batch or Counts.of([inputs], self.train_config)
        losses: BatchLosses = model(inputs, self.progress)
        loss = total(losses, counts, self.train_config)
        if not bool(torch.isfinite(loss)):
            raise TidecacheError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}: training stops; its documents are "
                f"{', '.join(dict.fromkeys(inputs.documents))}; lower --learning-rate, or look for likelihoods out of "
                "range with `tidecache cache verify`; checkpoints written before are complete"
            )
        self._record(inputs, losses, counts)
        loss = loss * self.args.world_size
        return (loss, losses) if return_outputs else loss

    def _record(self, batch: Batch, losses: BatchLosses, counts: Counts) -> None:
        """Add a micro-batch to what the next log line says; sums over ranks and steps."""
        parts: dict[str, float | Tensor] = {
            "ce": losses.ce.over(counts.ce).detach(),
            "distill": losses.distill.over(counts.distill).detach(),
            "nll": losses.nll_sum,
            "masked_tokens": len(batch.target_N),
            "chunks": len(batch.sample_C),
            "tidal_weight": losses.weight_sum,
            "student_logp": losses.student_logp_C.sum(),
            "teacher_logp": batch.teacher_logp_C.sum(),
            "rows": len(batch),
            "fresh_rows": batch.fresh,
            "tokens": int(batch.length_B.sum()),
            "masked_chunks": batch.coverage.masked,
            "usable_chunks": batch.coverage.usable,
        }
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log line, with the parts of the loss where it is a training step's.

        Per step: `ce`, `distill` (without distill_weight), `chunks`, `masked_tokens`, `rows`, `fresh_rows`. Per masked
        token, nats: `nll`. Per scored chunk: `tidal_weight`, and gold log-likelihoods of student and teacher, nats.
        """
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            values = torch.tensor([self._sums[n] for n in names], dtype=torch.float64, device=self.args.device)
            if self.args.world_size > 1:
                values = self.accelerator.reduce(values, reduction="sum")
            sums = dict(zip(names, values.tolist(), strict=True))
            steps = max(self._steps, 1)
            seconds = max(time.monotonic() - self._since, 1e-9)
            chunks, tokens = max(sums["chunks"], 1.0), max(sums["masked_tokens"], 1.0)
            logs |= {
                name: sums[name] / steps for name in ("ce", "distill", "chunks", "masked_tokens", "rows", "fresh_rows")
            }
            logs |= {name: sums[name] / chunks for name in ("tidal_weight", "student_logp", "teacher_logp")}
            logs |= {
                "nll": sums["nll"] / tokens,
                "coverage": sums["usable_chunks"] / max(sums["masked_chunks"], 1.0),
                "tokens_per_second": sums["tokens"] / seconds,
                "seconds_per_step": seconds / steps,
            }
            if self.train_config.tidal != "none":
                config = self.train_config
                progress = (self.state.global_step - 1) / max(self.state.max_steps, 1)
                schedule = (config.lambda_init, config.lambda_max, config.tidal_decay)
                logs["tidal_lambda"] = tidal.training_strength(progress, *schedule)
            self._sums, self._steps, self._since = {}, 0, time.monotonic()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:  # type: ignore[override]
        """6 per parameter of the body and token of [x_t, x_0], as Trainer counts them; the head is left out."""
        return 6 * 2 * inputs.noisy_BL.numel() * self._body_parameters

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """The dataset is in its final order already."""
        return SequentialSampler(self.train_rows)

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # type: ignore[override]
        return inputs.to(self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A plain Hugging Face folder; `state_dict` comes gathered from FSDP, with this module's prefix."""
        if not self.args.should_save:
            return
        state = None if state_dict is None else {name.removeprefix("model."): t for name, t in state_dict.items()}
        save_student(
            self.student.model,
            self.student.tokenizer,
            Path(output_dir or self.args.output_dir or "."),
            self.train_config,
            self.trained_from,
            state,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights of a checkpoint folder, into the model in place."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        restore_student(self.student.model, Path(resume_from_checkpoint))


def _body_parameters(student: Student) -> int:
    """Parameters that are neither embeddings nor head."""
    ends = {id(module.weight) for module in input_and_output(student.model)}
    return sum(p.numel() for p in student.model.parameters() if id(p) not in ends)


class LogFile(TrainerCallback):
    """Appends each log line to `train_log.jsonl`; a resumed run first drops the lines after its starting point."""

    def __init__(self, out: Path) -> None:
        self.path = out / LOG_FILE

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep what came before the step that training begins at."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.global_step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """One JSON object per line, with the step."""
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class ProgressBar(TrainerCallback):
    """A rich progress bar with the losses of the last log line."""

    def __init__(self, console: Console) -> None:
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the bar."""
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, losses="")
        if state.is_world_process_zero:
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the losses."""
        if logs and "ce" in logs:
            text = f"ce {logs['ce']:.3f}  distill {logs['distill']:.4f}  {logs['tokens_per_second']:,.0f} tokens/s"
            self.bar.update(self.task, losses=text)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the bar as it is."""
        self.bar.stop()

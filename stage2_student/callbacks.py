"""What a training run writes and shows, through Trainer's own callbacks: a file of JSON lines, and a line for people.

In a terminal there is a bar with the latest numbers; elsewhere (a log file, a batch system) a plain line now and then.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOG_FILE = "train_log.jsonl"
LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class LogFile(TrainerCallback):
    """Appends each log line to `train_log.jsonl`; a resumed run first drops the lines after its starting point."""

    def __init__(self, out: Path) -> None:
        self.path = out / LOG_FILE

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep what came before the step that training begins at; a line that a kill cut off goes too."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if state.global_step and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    if json.loads(line)["step"] <= state.global_step and "train_runtime" not in line:
                        kept.append(line)
                except ValueError:
                    break
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
                file.write(json.dumps({"step": state.global_step, **logs}, ensure_ascii=False) + "\n")


class Display(TrainerCallback):
    """A bar in a terminal, lines elsewhere; held-out evaluations are lines in both. Shown by the first process alone."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._shown = -LINE_EVERY
        self._begin = (0, 0.0)  # step and time

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show the bar."""
        self._begin = (state.global_step, time.monotonic())
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, line="")
        if state.is_world_process_zero and self.console.is_terminal:
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
        """Show the numbers of a training step, or of a held-out evaluation."""
        if not logs or not state.is_world_process_zero:
            return
        if "eval_bits_per_byte" in logs:
            self.bar.console.print(
                f"step {state.global_step:,}  {held_out_line(logs)}", soft_wrap=True, highlight=False
            )
        if "ce" not in logs:
            return
        if self.console.is_terminal:
            self.bar.update(self.task, line=short_line(logs))
            return
        now, last = time.monotonic(), state.global_step >= state.max_steps
        if now - self._shown >= LINE_EVERY or last:
            self._shown = now
            done = state.global_step - self._begin[0]
            left = (now - self._begin[1]) / max(done, 1) * (state.max_steps - state.global_step)
            rest = "" if last else f"  {timedelta(seconds=round(left))} left"
            text = f"step {state.global_step:,}/{state.max_steps:,}  {long_line(logs)}{rest}"
            self.console.print(text, soft_wrap=True, highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the bar as it is."""
        self.close()

    def close(self) -> None:
        """Leave the bar as it is; also when training ends with an error."""
        self.bar.stop()


def short_line(logs: dict[str, Any]) -> str:
    """Fits beside a bar in 80 columns."""
    return f"ce {logs['ce']:.3f}  distill {logs['distill']:.4f}  {logs['tokens_per_second']:,.0f} tok/s"


def long_line(logs: dict[str, Any]) -> str:
    """Losses, gold log-likelihoods, how fast and how large."""
    parts = [f"loss {logs['loss']:.4f}", f"ce {logs['ce']:.4f}"]
    if logs["chunks"]:
        parts += [
            f"distill {logs['distill']:.4f} (weight {logs['tidal_weight']:.2f})",
            f"gold log p {logs['student_logp']:.2f} (teacher {logs['teacher_logp']:.2f})",
        ]
    parts += [
        f"lr {logs['learning_rate']:.1e}",
        f"{logs['tokens_per_second']:,.0f} tokens/s",
        f"MFU {logs['mfu']:.1%}",
        f"{logs['peak_memory_gib']:.2f} GiB",
    ]
    return "  ".join(parts)


def held_out_line(logs: dict[str, Any]) -> str:
    """The three measures, over all timesteps."""
    return (
        f"held out: {logs['eval_bits_per_byte']:.3f} bits per byte, top-1 {logs['eval_accuracy']:.1%}, calibration error "
        f"{logs['eval_calibration_error']:.3f} ({logs['eval_documents']:,.0f} documents)"
    )

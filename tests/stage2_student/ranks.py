"""A program for `accelerate launch`: trains what a JSON file lists, one run after the other, in the processes it is given.

    accelerate launch … tests/stage2_student/ranks.py jobs.json

Each job: recipe, overrides, cache, base, out; `resume`: a checkpoint folder to begin from; `eval_cache`: a cache to
evaluate on. One launch serves several tests, since starting processes is what costs.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console

from stage2_student import run
from stage2_student.config import load_recipe


def main() -> None:
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config, out = load_recipe(job["recipe"], job["overrides"]), Path(job["out"])
        if "resume" in job:
            if os.environ["RANK"] == "0":
                shutil.copytree(job["resume"], out / Path(job["resume"]).name)
            torch.distributed.barrier()
        console = Console(file=io.StringIO(), width=120)
        resume, eval_cache = "resume" in job, job.get("eval_cache")
        run.train(config, job["cache"], job["base"], out, resume=resume, console=console, eval_cache=eval_cache)


if __name__ == "__main__":
    main()

"""Rows on their way to the model: loader processes, ranks, resumption, several caches, caches behind an address, damage."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from typer.testing import CliRunner

from shared.cache import open_cache
from shared.cache.mixing import WeightedCache
from shared.cache.reader import Cache
from shared.cache.stream import DrawStream
from shared.errors import TidecacheError
from shared.tokenization import TextTokenizer
from stage2_student import commands, run
from stage2_student.config import TrainConfig, load_recipe
from stage2_student.data import Row, RowMaker
from stage2_student.dataset import TrainingRows
from tests.shared.cache.servers import WithRanges, serve
from tests.stage2_student import synthetic

BATCH, STEPS = 3, 16
Key = tuple[str, int, bool, bytes]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Another spec: 6 texts, 2 draws each."""
    return synthetic.make_cache(
        tmp_path_factory.mktemp("cache") / "other", synthetic.texts(6, skip=40), draws=2, per_shard=2, seed=5
    )


@pytest.fixture
def rows(cache: Cache, other: Cache, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> TrainingRows:
    """Two caches, fresh rows between, groups of three, windows of a shard or two."""
    monkeypatch.setattr("shared.cache.order.WINDOW_DRAWS", 8)
    draws = DrawStream([cache, other], [2, 1], seed=3, together=3)
    makers = [RowMaker(tokenizer, c.spec, 32, "compdemo", seed=3) for c in (cache, other)]
    return TrainingRows(draws, makers, 0.25, BATCH * 4 * STEPS)


def keys(rows: list[Row]) -> list[Key]:
    return [(row.document, row.draw, row.fresh, row.masked_L.tobytes()) for row in rows]


@pytest.fixture
def expected(rows: TrainingRows) -> list[Key]:
    return keys([rows[n] for n in range(len(rows))])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_any_number_of_loader_processes_gives_the_same_rows(
    rows: TrainingRows, expected: list[Key], workers: int
) -> None:
    loaded = DataLoader(rows, BATCH, collate_fn=keys, num_workers=workers)
    assert list(itertools.chain.from_iterable(loaded)) == expected


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 1), (4, 0), (4, 2)])
def test_any_number_of_ranks_sees_the_same_rows_in_each_step(
    rows: TrainingRows, expected: list[Key], ranks: int, workers: int
) -> None:
    """As Trainer shards batches; a step of R ranks has R batches."""
    batches = BatchSampler(SequentialSampler(rows), BATCH, drop_last=False)
    by_rank = []
    for rank in range(ranks):
        shard = BatchSamplerShard(batches, num_processes=ranks, process_index=rank, split_batches=False)
        by_rank.append(list(DataLoader(rows, batch_sampler=shard, collate_fn=keys, num_workers=workers)))
    steps = [list(itertools.chain.from_iterable(parts)) for parts in zip(*by_rank, strict=True)]
    assert list(itertools.chain.from_iterable(steps)) == expected


@pytest.mark.parametrize("done", [1, 7, 30])
def test_a_resumed_loader_goes_on_at_the_next_row(rows: TrainingRows, expected: list[Key], done: int) -> None:
    loader = skip_first_batches(DataLoader(rows, BATCH, collate_fn=keys, num_workers=1), done)
    assert list(itertools.chain.from_iterable(loader)) == expected[done * BATCH :]


def test_a_longer_run_begins_with_the_shorter_ones_rows(rows: TrainingRows, expected: list[Key]) -> None:
    longer = TrainingRows(rows.draws, rows.makers, rows.fresh, 2 * len(rows))
    assert keys([longer[n] for n in range(len(rows))]) == expected


# --- whole runs --------------------------------------------------------------------------------------------------


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def short(**values: Any) -> TrainConfig:
    return load_recipe(
        "reverse-calm-tidal", {"batch": 4, "steps": 4, "save_steps": 2, "learning_rate": 1e-3, "fresh": 0.5, **values}
    )


def test_a_run_on_two_caches_resumes_exactly_and_only_with_the_same_two(
    cache: Cache, other: Cache, student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [WeightedCache(str(cache.path), 2.0), WeightedCache(str(other.path))]
    console = quiet()
    run.train(short(draws_together=2), both, student_folder, tmp_path / "whole", console=console)
    assert "66.7% of the rows" in console.file.getvalue()  # type: ignore[attr-defined]
    metadata = json.loads((tmp_path / "whole" / "tidecache.json").read_text())
    assert metadata["caches"] == [
        {"fingerprint": c.spec.fingerprint, "content": c.manifest.content, "weight": w}
        for c, w in ((cache, 2.0), (other, 1.0))
    ]
    with monkeypatch.context() as patch:
        patch.setattr(run.StudentTrainer, "compute_loss", stop_at(3, run.StudentTrainer.compute_loss))
        with pytest.raises(KeyboardInterrupt):
            run.train(short(draws_together=2), both, student_folder, tmp_path / "cut", console=quiet())
    for changed in ([both[0]], [both[0], WeightedCache(both[1].path, 3.0)], both[::-1]):
        with pytest.raises(TidecacheError, match=r"caches: .* there, .* now"):
            run.train(short(draws_together=2), changed, student_folder, tmp_path / "cut", resume=True, console=quiet())
    run.train(short(draws_together=2), both, student_folder, tmp_path / "cut", resume=True, console=quiet())
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def stop_at(step: int, original: Any) -> Any:
    def stopped(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    return stopped


def test_every_cache_must_have_what_the_recipe_needs(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    gold = synthetic.make_cache(tmp_path / "gold", synthetic.texts(2), draws=1, lanes=("gold",))
    both = [WeightedCache(str(cache.path)), WeightedCache(str(gold.path))]
    with pytest.raises(TidecacheError, match=rf"{gold.path}: objective: kl needs the topk lane, the cache holds gold"):
        run.prepare(load_recipe("events", {"steps": 1}), both, student_folder)


def test_a_batch_of_broken_groups_is_refused() -> None:
    with pytest.raises(TidecacheError, match="draws_together: a batch holds whole groups of 3 rows, found batch 4"):
        short(draws_together=3)


def test_a_run_reads_its_cache_from_a_server(cache: Cache, student_folder: Path, tmp_path: Path) -> None:
    config = short(steps=2, save_steps=0, workers=1)
    run.train(config, cache.path, student_folder, tmp_path / "here", console=quiet())
    with serve(Path(cache.path).parent, WithRanges) as (address, requests):  # type: ignore[arg-type]
        arguments = ["train", "--cache", f"{address}/{Path(str(cache.path)).name}=1", "--base", str(student_folder)]
        arguments += ["--out", str(tmp_path / "there"), "--batch", "4", "--steps", "2", "--save-steps", "0"]
        arguments += ["--learning-rate", "1e-3", "--fresh", "0.5", "--workers", "1"]
        result = CliRunner().invoke(commands.app, arguments)
        assert result.exit_code == 0, result.output
        assert any(path.endswith(".likelihoods.parquet") for _, path, _ in requests)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("here", "there"))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_in_mid_run_stops_it_with_one_line_that_names_the_file(
    student_folder: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.cache.order.WINDOW_DRAWS", 1)
    monkeypatch.setattr(run, "COVERAGE_DRAWS", 4)
    made = synthetic.make_cache(tmp_path / "cache", synthetic.texts(12), draws=1, per_shard=4)
    config = short(steps=3, fresh=0.0, workers=workers, save_steps=1)
    rows = run.prepare(config, made.path, student_folder).rows
    shard = int(rows.draws.indexes[0].shard_R[rows.draws.place(8).row])
    path = tmp_path / "cache" / open_cache(made.path).shards[shard].likelihoods[0].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(TidecacheError) as caught:
        run.train(config, made.path, student_folder, tmp_path / "out", console=quiet())
    assert str(caught.value).startswith(f"{path}: expected the digest")
    assert "\n" not in str(caught.value)
    lines = (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps in ([1], [1, 2])  # nothing of the third batch; accelerate asks for it before the second is used

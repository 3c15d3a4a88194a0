"""Actors under a real local Ray: tasks of dead actors are done by others, and what cannot be done is said."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.errors import TidecacheError
from stage1_teacher.actors import ATTEMPTS, Actors, ActorSettings, _place
from tests.stage1_teacher.ray_workers import Doubler, Individual, NeverStarts

TWO = ActorSettings(actors=2)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def crew(worker: Any, settings: ActorSettings = TWO) -> Actors[Any, Any]:
    def agree(ours: object, theirs: object) -> None:
        if ours != theirs:
            raise TidecacheError("they differ")

    return Actors(worker, settings, lambda task: f"the task {task}", agree)


def doubler(folder: Path, die: Any = (), raise_: Any = (), refuse: Any = (), company: int = 1) -> Doubler:
    return Doubler(folder, dict(die), dict(raise_), dict(refuse), company)


def tries(folder: Path) -> dict[int, int]:
    names = [int(path.name.split("-")[0]) for path in folder.glob("*-*")]
    return {task: names.count(task) for task in names}


def test_every_task_once_on_both_actors(tmp_path: Path) -> None:
    with crew(doubler(tmp_path, company=2)) as actors:
        assert actors.describe() == "a doubler"
        results = list(actors.run(iter(range(40))))
        assert sorted(doubled for doubled, _ in results) == list(range(0, 80, 2))
        assert len({process for _, process in results}) == 2
        assert list(actors.run(iter([]))) == []
        assert sorted(doubled for doubled, _ in actors.run(iter([7, 8]))) == [14, 16]  # the crew can be used again


def test_lost_tasks_are_done_by_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One dies and takes along what it holds; one only raises, and its process is replaced all the same."""
    with crew(doubler(tmp_path, die={3: 1, 11: 2}, raise_={20: 1})) as actors:
        results = list(actors.run(iter(range(30))))
    assert sorted(doubled for doubled, _ in results) == list(range(0, 60, 2))
    assert len({process for _, process in results}) >= 4
    assert tries(tmp_path)[11] == 3
    assert sum(tries(tmp_path).values()) <= 30 + 4 * 2  # nobody does again what was done
    assert "the task 11 was lost with its actor" in caplog.text
    assert "illegal memory access" in caplog.text


def collect(tasks: Iterator[int], worker: Doubler, words: str) -> list[int]:
    """The tasks whose results came before the error that says this."""
    done = []

    def run() -> None:
        with crew(worker) as actors:
            for doubled, _ in actors.run(tasks):
                done.append(doubled // 2)

    with pytest.raises(TidecacheError, match=words):
        run()
    return done


@pytest.mark.parametrize("how", ["die", "raise_"])
def test_a_task_that_always_fails(tmp_path: Path, how: str) -> None:
    """It is named, not one that was beside it, and what others had in work is kept."""
    worker = doubler(tmp_path, **{how: {3: 99}})
    words = rf"the task 3 failed {ATTEMPTS} times on Ray actors, .* alone: .*kept"
    done = collect(iter(range(1000)), worker, words)
    assert tries(tmp_path)[3] == ATTEMPTS
    assert len(set(done)) == len(done)
    assert set(done) == tries(tmp_path).keys() - {3}


def test_a_users_mistake_is_not_tried_again(tmp_path: Path) -> None:
    collect(iter(range(1000)), doubler(tmp_path, refuse={5: 99}), r"^5 cannot be doubled")
    assert tries(tmp_path)[5] == 1
    assert len(tries(tmp_path)) < 20


def test_an_error_in_the_tasks_keeps_what_is_in_work(tmp_path: Path) -> None:
    def torn() -> Iterator[int]:
        yield from range(10)
        raise TidecacheError("line 11 is torn")

    assert sorted(collect(torn(), doubler(tmp_path), "line 11 is torn")) == list(range(10))


@pytest.mark.parametrize(
    ("dies", "words"), [(True, f"{ATTEMPTS} Ray actors died before"), (False, "weights are not here")]
)
def test_workers_that_do_not_start(dies: bool, words: str) -> None:
    with crew(NeverStarts(dies)) as actors, pytest.raises(TidecacheError, match=words):
        actors.describe()


def test_workers_that_differ() -> None:
    with crew(Individual()) as actors:
        actors.describe()
        with pytest.raises(TidecacheError, match="they differ"):
            list(actors.run(iter(range(100_000))))


def test_more_than_the_cluster_has_room_for() -> None:
    for settings, words in (
        (ActorSettings(actors=3), r"3 actors of 1 CPUs and 0 GPUs each .* has 2 CPUs and 0 GPUs: give fewer --actors"),
        (ActorSettings(actors=1, gpus=1), "1 actors of 1 CPUs and 1 GPUs"),
        (ActorSettings(cpus=4), "1 actors of 4 CPUs"),
    ):
        with pytest.raises(TidecacheError, match=words), crew(Individual(), settings):
            pass
    with crew(Individual(), ActorSettings(cpus=0.5)) as actors:
        assert actors.count == 4


def test_how_many_actors_a_cluster_of_gpus_has_room_for() -> None:
    cluster = {"CPU": 16.0, "GPU": 8.0, "memory": 1e12}
    for settings, gpus, count in (
        (ActorSettings(), 1, 8),
        (ActorSettings(devices=2), 2, 4),  # tensor parallel
        (ActorSettings(gpus=0.5), 0.5, 16),
        (ActorSettings(gpus=0), 0, 16),
        (ActorSettings(cpus=4), 1, 4),
        (ActorSettings(actors=3), 1, 3),
    ):
        assert _place(cluster, settings) == ({"num_cpus": settings.cpus, "num_gpus": gpus}, count)

"""Workers on Ray actors, on one machine or many: tasks go to whoever is free, and those of a dead actor to another.

`Actors` knows nothing of teachers: a worker is any object that can be pickled and has `start` and `work`. Each actor gets
a copy and starts it; what the copies say about themselves must agree. An actor holds two tasks at a time: with a GPU, or
with CPUs to spare, it prepares one while the other is computed; else the second one waits at hand. With an actor only
those are lost. They are given to others, each alone: so a task that kills whoever does it is told from one that was only
beside it, and after some attempts it is an error. Results come back to the calling process, so the machines need no file
system in common.

Mistakes that a user can mend (`TidecacheError`) are not tried again. After an error no new task is begun, and what is in
work is waited for, so that its results are kept.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from shared.errors import TidecacheError

ATTEMPTS = 3  # at one task, and at starting a worker
AHEAD = 2  # tasks that an actor holds
PATIENCE = 60.0  # seconds without an actor before a word is said about it
log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
TaskIn = TypeVar("TaskIn", contravariant=True)
ResultOut = TypeVar("ResultOut", covariant=True)


class Worker(Protocol[TaskIn, ResultOut]):
    """What an actor holds. `work` may be called from `AHEAD` threads at a time."""

    def start(self) -> Any:
        """Load what is heavy; what it gives must be the same on every actor."""

    def work(self, task: TaskIn) -> ResultOut:
        """Do one task."""


@dataclass(frozen=True)
class ActorSettings:
    """How many actors there are, and what Ray reserves for each; None: as many as the cluster has room for, and one GPU
    each where there are some.
    """

    actors: int | None = None
    cpus: float = 1.0
    gpus: float | None = None
    devices: int = 1  # GPUs of one worker, where `gpus` is None


@dataclass(frozen=True)
class _Refusal:
    """A `TidecacheError` on its way through Ray."""

    text: str
    host: str


class _Host:
    """The actor: a worker, whose mistakes come back as values."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def start(self) -> Any:
        return self._answer(self._worker.start)

    def work(self, task: Any) -> Any:
        return self._answer(self._worker.work, task)

    def _answer(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except TidecacheError as error:
            return _Refusal(str(error), socket.gethostname())


class _Member:
    """An actor as the caller sees it."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.started = False
        self.alone = False  # its task has been lost before
        self.tasks = 0


@dataclass
class _Attempt(Generic[Task]):
    task: Task
    number: int = 1


class Actors(Generic[Task, Result]):
    """A crew of actors with one worker each; `name` says what a task is called in errors. Use as a context manager.

    `agree` is given what two workers said at their start, and raises TidecacheError if they must not work together.
    """

    def __init__(
        self,
        worker: Worker[Task, Result],
        settings: ActorSettings,
        name: Callable[[Task], str],
        agree: Callable[[Any, Any], None],
    ) -> None:
        self._worker = worker
        self._settings = settings
        self._name = name
        self._agree = agree
        self._description: Any = None
        self._failed_starts = 0
        self._members: list[_Member] = []
        self._flying: dict[Any, tuple[_Member, _Attempt[Task] | None]] = {}  # by Ray's reference; None: a start

    def __enter__(self) -> Actors[Task, Result]:
        """Connect to the cluster that there is (`ray start`, RAY_ADDRESS), or begin one on this machine.

        Raises:
            TidecacheError: no Ray, or the cluster has not what was asked for.
        """
        self._ray = _require_ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            try:
                self._ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise TidecacheError(
                    f"Ray could not be started or reached ({_short(error)}): see RAY_ADDRESS, or `ray stop` leftovers"
                ) from error
        self._options, self.count = _place(self._ray.cluster_resources(), self._settings)
        kind: Any = self._ray.remote(_Host)
        worker = self._ray.put(self._worker)  # once, however many actors take it
        # Two tasks at a time on one CPU and no GPU would only be in each other's way.
        spare = self._options["num_gpus"] > 0 or self._options["num_cpus"] >= AHEAD
        settings = {"max_concurrency": AHEAD if spare else 1, **self._options}
        self._hire_one = lambda: kind.options(**settings).remote(worker)
        for _ in range(self.count):
            self._hire()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the actors go."""
        for member in self._members:
            self._ray.kill(member.handle)
        if self._ours:
            self._ray.shutdown()

    def describe(self, everyone: bool = False) -> Any:
        """What the first worker to start says about itself; `everyone`: once all have started.

        Raises:
            TidecacheError: one cannot start.
        """
        while self._description is None or (everyone and not all(member.started for member in self._members)):
            for reference in self._landed():
                self._take_start(reference)
        return self._description

    def run(self, tasks: Iterator[Task]) -> Iterator[Result]:
        """The results of all tasks, in the order in which they come.

        Raises:
            TidecacheError: from `tasks` or a worker; a task that failed `ATTEMPTS` times; workers that do not start.
        """
        again: deque[_Attempt[Task]] = deque()
        left, error = True, None
        while True:
            try:
                if error is None:
                    left = self._hand_out(tasks, again, left)
                working = any(attempt is not None for _, attempt in self._flying.values())
                if not working and (error is not None or not (left or again)):
                    break
                for reference in self._landed():
                    if self._flying[reference][1] is None:
                        self._take_start(reference)
                    else:
                        yield from self._take_result(reference, again)
            except TidecacheError as mistake:
                error = error or mistake
        if error is not None:
            raise error

    def _hand_out(self, tasks: Iterator[Task], again: deque[_Attempt[Task]], left: bool) -> bool:
        """Give tasks to whoever is free, lost ones first and each to an actor that has nothing else; False: no more come."""
        for member in self._members:
            if not member.started:
                continue
            if again:
                if member.tasks == 0:
                    self._give(member, again.popleft())
                continue
            while left and member.tasks < AHEAD and not member.alone:
                task = next(tasks, None)
                if task is None:
                    return False
                self._give(member, _Attempt(task))
        return left

    def _give(self, member: _Member, attempt: _Attempt[Task]) -> None:
        member.tasks += 1
        member.alone = attempt.number > 1
        self._flying[member.handle.work.remote(attempt.task)] = member, attempt

    def _landed(self) -> list[Any]:
        """The references of the next thing that happens; after some time without an actor, a word about it and none."""
        done, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=PATIENCE)
        if not done and not any(member.started for member in self._members):
            log.warning(
                "waiting for Ray: none of %d actors has started yet (each needs %s)", self.count, _needs(self._options)
            )
        return list(done)

    def _take_start(self, reference: Any) -> None:
        member, _, answer, reason = self._fetch(reference)
        if reason is not None:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS:
                raise TidecacheError(
                    f"{ATTEMPTS} Ray actors died before they had loaded what they work with; the last one: {reason}"
                )
            return
        if self._description is None:
            self._description = answer
        self._agree(self._description, answer)
        member.started = True
        self._failed_starts = 0

    def _take_result(self, reference: Any, again: deque[_Attempt[Task]]) -> Iterator[Result]:
        """The result that came, or none where the actor was lost: then the task is for another."""
        member, attempt, answer, reason = self._fetch(reference)
        assert attempt is not None
        member.tasks -= 1
        if reason is None:
            member.alone = False
            yield answer
        elif attempt.number >= ATTEMPTS:
            raise TidecacheError(
                f"{self._name(attempt.task)} failed {ATTEMPTS} times on Ray actors, the last time alone: {reason}; what is "
                f"complete is kept"
            )
        else:
            log.warning(
                "%s was lost with its actor (%s) and is done again by another", self._name(attempt.task), reason
            )
            again.append(_Attempt(attempt.task, attempt.number + 1))

    def _fetch(self, reference: Any) -> tuple[_Member, _Attempt[Task] | None, Any, str | None]:
        """(actor, task, answer, None), or why the actor is lost; it is replaced then.

        Raises:
            TidecacheError: the worker's own.
        """
        member, attempt = self._flying.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            reason = f"{type(cause).__name__}: {_short(cause)}" if isinstance(cause, Exception) else _short(error)
            self._replace(member)
            return member, attempt, None, reason
        if isinstance(answer, _Refusal):
            where = "" if answer.host == socket.gethostname() else f"on {answer.host}: "
            raise TidecacheError(where + answer.text)
        return member, attempt, answer, None

    def _hire(self) -> None:
        member = _Member(self._hire_one())
        self._members.append(member)
        self._flying[member.handle.start.remote()] = member, None

    def _replace(self, member: _Member) -> None:
        """Once for each; an actor that only raised may have a device in a bad state, so its process goes too."""
        if member in self._members:
            self._members.remove(member)
            self._ray.kill(member.handle)
            self._hire()


def _require_ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise TidecacheError(
            "--engine ray needs Ray, which is not installed: pip install 'tidecache[ray]' (--part i/n does without it)"
        )
    import ray

    return ray


def _place(resources: dict[str, float], settings: ActorSettings) -> tuple[dict[str, float], int]:
    """(what Ray reserves for an actor, how many actors).

    Raises:
        TidecacheError: the cluster has no room for them.
    """
    devices = resources.get("GPU", 0.0)
    gpus = settings.gpus if settings.gpus is not None else (settings.devices if devices else 0.0)
    options = {"num_cpus": settings.cpus, "num_gpus": gpus}
    rooms = [int(resources.get(kind, 0.0) / need) for kind, need in (("CPU", settings.cpus), ("GPU", gpus)) if need]
    room = min(rooms, default=1)
    count = settings.actors or room
    if count > room or not count:
        raise TidecacheError(
            f"{max(count, 1)} actors of {_needs(options)} each do not fit in this Ray cluster, which has "
            f"{resources.get('CPU', 0):g} CPUs and {devices:g} GPUs: give fewer --actors, or smaller --cpus-per-actor or "
            f"--gpus-per-actor"
        )
    return options, count


def _needs(options: dict[str, float]) -> str:
    return f"{options['num_cpus']:g} CPUs and {options['num_gpus']:g} GPUs"


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

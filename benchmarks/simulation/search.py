"""A search as events in simulated time: trials climb the ladder on a cluster whose nodes fail.

What is simulated is how the search works (`ray_jobs/tuning/`): as many trials at once as are
wanted and there are devices for; each rung is measured beside the training, by all evaluators together, one
rung at a time; a trial holds its devices until its last rung is measured or until ASHA stops it; a node that
fails ends the trainings on it, which go on from their last checkpoints. Left out: the time that a checkpoint
takes (it is written beside the training), failures of evaluators and of the head node, and nodes that are not
replaced within the restart.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from benchmarks.simulation.halving import Halving

Scores = Sequence[Mapping[int, float]]
"""The FID of each trial at every step of the ladder, in the order in which trials start."""


@dataclass(frozen=True)
class Timing:
    """Measured seconds; each that is needed is drawn from its list.

    Where training and evaluators share cores they hold each other up, so both are told twice.

    Attributes:
        startup: of a trial, until its first step begins; drawn for each start.
        step: of the denoiser, up to the first rung; drawn for each trial.
        evaluation: of one evaluator for all pictures of a rung; drawn for each rung.
        step_beside: of a step after the first rung, when rungs are measured beside; empty: as before it.
        evaluation_alone: of the last rung, when the training is over; empty: as of the others.
    """

    startup: Sequence[float]
    step: Sequence[float]
    evaluation: Sequence[float]
    step_beside: Sequence[float] = ()
    evaluation_alone: Sequence[float] = ()


@dataclass(frozen=True)
class Plan:
    """What is searched.

    Attributes:
        trials, ladder, reduction_factor: as in the configuration's `search`.
        workers: devices of a trial.
        concurrent: trials at once, where there are devices for them.
        asha: whether it stops trials; else nothing does.
        checkpoint_s: seconds between checkpoints, besides those of the rungs.
    """

    trials: int
    ladder: Sequence[int]
    workers: int = 1
    concurrent: int = 1
    asha: bool = True
    reduction_factor: int = 2
    checkpoint_s: float = 600.0


@dataclass(frozen=True)
class Cluster:
    """What it runs on.

    Attributes:
        devices: that train.
        evaluators: devices beside them.
        node_mtbf: mean seconds between two failures of a node; they are a Poisson process.
        restart: seconds from a failure to the next step; None: a start-up.
        price: of a device for an hour, of evaluators for the whole search.
    """

    devices: int
    evaluators: int = 1
    devices_a_node: int = 8
    node_mtbf: float = math.inf
    restart: float | None = None
    price: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a simulated search took.

    Attributes:
        seconds: until the last trial has ended.
        worker_hours: of devices that trials held.
        steps: that were computed, also those that were not kept.
        lost_steps: computed again after failures.
        failures: of nodes on which something trained.
        reached: the last measured rung of each trial.
    """

    seconds: float
    worker_hours: float
    cost: float
    steps: int
    lost_steps: int
    failures: int
    reached: tuple[int, ...]


@dataclass
class Climb:
    """A trial that has begun.

    Attributes:
        steps_s: seconds of a step up to the first rung, and after it.
        held: devices by node.
        since: when its training goes on, or went on, from `kept`: a rung or the last checkpoint.
        rung: number of the next one on its ladder.
        attempt: how often it was restarted.
        waiting: rungs that are reached and not measured.
    """

    trial: int
    began: float
    steps_s: tuple[float, float]
    held: dict[int, int]
    since: float
    kept: int = 0
    lost: int = 0
    rung: int = 0
    attempt: int = 0
    waiting: list[int] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        return self.steps_s[self.rung > 0]

    def done(self, now: float) -> int:
        """Whole steps since `kept`."""
        return max(0, int((now - self.since) / self.step_s + 1e-9))


class Simulation:
    """One search from its beginning to its end.

    Args:
        draw: all that is random.
    """

    def __init__(
        self, plan: Plan, cluster: Cluster, timing: Timing, scores: Scores, draw: random.Random
    ) -> None:
        if plan.workers > cluster.devices:
            raise ValueError(f"workers: {plan.workers} of a trial, but {cluster.devices} devices; lower them")
        self.plan, self.cluster, self.timing, self.scores, self.draw = plan, cluster, timing, scores, draw
        nodes, over = divmod(cluster.devices, cluster.devices_a_node)
        self.free = [cluster.devices_a_node] * nodes + [over] * bool(over)
        self.halving = Halving(plan.ladder, plan.reduction_factor) if plan.asha else None
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.now = self.evaluators_free_at = self.worker_seconds = 0.0
        self.climbs: dict[int, Climb] = {}
        self.begun = self.numbered = self.steps = self.lost = self.failures = 0
        self.reached = [0] * plan.trials

    def run(self) -> Outcome:
        self._begin_trials()
        if math.isfinite(self.cluster.node_mtbf):
            self._await_failure()
        while self.climbs:
            self.now, _, happen = heappop(self.events)
            happen()
        hours = self.worker_seconds / 3600
        whole = hours + self.cluster.evaluators * self.now / 3600
        return Outcome(
            seconds=self.now,
            worker_hours=hours,
            cost=whole * self.cluster.price,
            steps=self.steps,
            lost_steps=self.lost,
            failures=self.failures,
            reached=tuple(self.reached),
        )

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        self.numbered += 1  # what is due at the same time happens in this order
        heappush(self.events, (when, self.numbered, happen))

    def _begin_trials(self) -> None:
        plan = self.plan
        while self.begun < plan.trials and len(self.climbs) < plan.concurrent:
            if sum(self.free) < plan.workers:
                return
            first = self.draw.choice(self.timing.step)
            later = self.draw.choice(self.timing.step_beside) if self.timing.step_beside else first
            since = self.now + self._startup()
            climb = Climb(self.begun, self.now, (first, later), self._place(), since)
            self.climbs[self.begun] = climb
            self.begun += 1
            self._train(climb)

    def _startup(self) -> float:
        return self.draw.choice(self.timing.startup)

    def _place(self) -> dict[int, int]:
        """Take a trial's devices: of the fullest node that has enough, else of the emptiest ones."""
        need, held = self.plan.workers, dict[int, int]()
        enough = [node for node, free in enumerate(self.free) if free >= need]
        emptiest = sorted(range(len(self.free)), key=lambda node: -self.free[node])
        for node in [min(enough, key=lambda node: self.free[node])] if enough else emptiest:
            taken = min(need - sum(held.values()), self.free[node])
            if taken:
                self.free[node] -= taken
                held[node] = taken
        return held

    def _train(self, climb: Climb) -> None:
        """Go on from `kept` to the next rung."""
        attempt, left = climb.attempt, self.plan.ladder[climb.rung] - climb.kept
        self._at(climb.since + left * climb.step_s, lambda: self._reach(climb, attempt))

    def _reach(self, climb: Climb, attempt: int) -> None:
        if self._is_over(climb) or attempt != climb.attempt:
            return  # it was stopped, or failed on the way
        climb.waiting.append(climb.rung)
        climb.kept, climb.since = self.plan.ladder[climb.rung], self.now
        climb.rung += 1
        if climb.rung < len(self.plan.ladder):
            self._train(climb)
        if len(climb.waiting) == 1:
            self._evaluate(climb)

    def _is_over(self, climb: Climb) -> bool:
        return climb.trial not in self.climbs

    def _evaluate(self, climb: Climb) -> None:
        """Its first rung that waits; a trial's next one is sent when that is measured."""
        is_last = self.plan.ladder[climb.waiting[0]] == self.plan.ladder[-1]
        measured = (is_last and self.timing.evaluation_alone) or self.timing.evaluation
        seconds = self.draw.choice(measured) / self.cluster.evaluators
        self.evaluators_free_at = max(self.now, self.evaluators_free_at) + seconds
        self._at(self.evaluators_free_at, lambda: self._measure(climb))

    def _measure(self, climb: Climb) -> None:
        step = self.plan.ladder[climb.waiting.pop(0)]
        self.reached[climb.trial] = step
        fid = self.scores[climb.trial][step]
        last = step == self.plan.ladder[-1]
        if last or (self.halving and self.halving.stops(climb.trial, step, fid)):
            self._end(climb)
        elif climb.waiting:
            self._evaluate(climb)

    def _end(self, climb: Climb) -> None:
        climbing = climb.rung < len(self.plan.ladder)
        self.steps += climb.kept + climb.lost + (climb.done(self.now) if climbing else 0)
        self.lost += climb.lost
        self.worker_seconds += (self.now - climb.began) * self.plan.workers
        for node, held in climb.held.items():
            self.free[node] += held
        del self.climbs[climb.trial]
        self._begin_trials()

    def _await_failure(self) -> None:
        rate = len(self.free) / self.cluster.node_mtbf
        self._at(self.now + self.draw.expovariate(rate), self._fail)

    def _fail(self) -> None:
        node = self.draw.randrange(len(self.free))
        hit = [
            climb
            for climb in self.climbs.values()
            if node in climb.held and climb.rung < len(self.plan.ladder)
        ]
        self.failures += bool(hit)
        for climb in hit:
            every = max(1, math.ceil(self.plan.checkpoint_s / climb.step_s - 1e-9))
            done = climb.done(self.now)
            climb.kept += done // every * every
            climb.lost += done % every
            climb.attempt += 1
            restart = self.cluster.restart
            climb.since = self.now + (self._startup() if restart is None else restart)
            self._train(climb)
        self._await_failure()

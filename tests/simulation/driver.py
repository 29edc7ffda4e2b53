"""One seed, from the first request to the last: the engine core's policies, the clients, the faults and the verdict."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from server.engine.plan import RequestOutput, RowResult, StepPlan, StepResult
from server.engine.request import FinishReason, Request, RequestStatus
from server.engine.scheduler import Scheduler
from tests.simulation.device import Device, Launch
from tests.simulation.invariants import Violation, Watch, require
from tests.simulation.oracle import Answer, answer
from tests.simulation.world import Arrival, World, make_world

MAX_IDLE_TICKS = 200  # a run in which no step is planned for so long, though requests are open, never ends

MakeScheduler = Callable[..., Scheduler]


class SimulationFailure(AssertionError):
    """A seed has failed; the message says which, how to run it again, and what happened last."""


@dataclass
class Client:
    """Reads one request's tokens. A client that stalls lets them pile up, and loses none for it."""

    arrival: Arrival
    answer: Answer
    request: Request
    read: list[int] = field(default_factory=list)
    mailbox: list[int] = field(default_factory=list)
    ended: FinishReason | None = None

    def receive(self, output: RequestOutput) -> None:
        request_id = output.request.request_id
        require(self.ended is None, f"request {request_id} has ended and still gets tokens")
        self.mailbox += output.token_ids
        tokens = self.tokens
        require(
            tuple(tokens) == self.answer.token_ids[: len(tokens)],
            f"request {request_id} got {tokens}, right is {list(self.answer.token_ids)}",
        )
        require(bool(output.token_ids) or output.finish_reason is FinishReason.ERROR, "an output without tokens")
        self.ended = output.finish_reason
        if self.ended in (FinishReason.STOP, FinishReason.LENGTH):
            ending = (tuple(tokens), self.ended, output.stop_token_id)
            right = (self.answer.token_ids, self.answer.finish_reason, self.answer.stop_token_id)
            require(ending == right, f"request {request_id} ended with {ending}, right is {right}")

    @property
    def tokens(self) -> list[int]:
        return self.read + self.mailbox


class Simulation:
    """Runs a world to its end. `make_scheduler` is Scheduler, or a planted bug."""

    def __init__(self, world: World, make_scheduler: MakeScheduler = Scheduler) -> None:
        self.world = world
        self.rng = world.rng
        self._make_scheduler = make_scheduler
        self.time = self.idle_ticks = 0
        self.trace: deque[tuple[object, ...]] = deque(maxlen=40)
        self.clients: dict[int, Client] = {}
        self.to_come = deque(world.arrivals)
        self.may_fail: set[int] = set()
        self._start_engine()

    def _start_engine(self) -> None:
        config = self.world.config
        self.scheduler = self._make_scheduler(config, self.world.digest)
        self.device = Device(config.num_blocks, config.block_size, config.eos_token_ids, self.rng)
        self.watch = Watch(self.world)
        self.launches: deque[Launch] = deque()

    def run(self) -> None:
        while self.to_come or self.scheduler.has_work:
            self._tick()
            open_requests = [request.request_id for request in self.scheduler.requests]
            self.idle_ticks = self.idle_ticks + 1 if open_requests else 0
            require(self.idle_ticks < MAX_IDLE_TICKS, "no progress: requests", open_requests)
        for client in self.clients.values():
            require(client.ended is not None, f"request {client.request.request_id} never ended")
        self.watch.over(self.scheduler)
        pool = self.scheduler.pool
        require(pool.num_used == 0, f"{pool.num_used} blocks are lost")
        require(pool.num_free + pool.num_cached == pool.num_blocks, "blocks are missing")

    def _chance(self, name: str) -> bool:
        chance = self.world.chances[name]
        return chance > 0.0 and self.rng.random() < chance

    def _log(self, *event: object) -> None:
        self.trace.append((self.time, *event))

    # ---- one tick of the virtual clock ----

    def _tick(self) -> None:
        self.time += 50 if self._chance("clock jump") else 1
        while self.to_come and self.to_come[0].time <= self.time:
            self._arrive(self.to_come.popleft())
        self._clients_act()
        self._faults()
        plan = self._schedule()
        if plan is not None:
            self._launch(plan)
        while self.rng.random() < 0.5 and self._execute_next():
            pass
        if self.launches and (plan is None or self.rng.random() < 0.7):
            self._deliver()
        self._check()

    def _arrive(self, arrival: Arrival) -> None:
        config, request = self.world.config, arrival.request
        right = answer(request, config.max_model_len, config.eos_token_ids)
        self.clients[request.request_id] = Client(arrival, right, request)
        self._add(request)

    def _add(self, request: Request) -> None:
        self._log("add", request.request_id, f"{request.num_known_tokens} tokens", request.tenant, request.priority)
        self.scheduler.add(request)
        self.watch.added(request)

    def _clients_act(self) -> None:
        for client in self._open_clients():
            if not client.arrival.stalls or self.rng.random() < 0.05:
                client.read += client.mailbox
                client.mailbox.clear()
            deadline = client.arrival.deadline
            if deadline is not None and deadline <= self.time:
                self._abort(client)

    def _open_clients(self) -> list[Client]:
        return [self.clients[request.request_id] for request in self.scheduler.requests]

    def _faults(self) -> None:
        if self._chance("abort"):
            open_clients = self._open_clients()
            if open_clients:
                self._abort(self.rng.choice(open_clients))
        if self._chance("preempt"):
            running = [r for r in self.scheduler.requests if r.status is RequestStatus.RUNNING]
            if running:
                request = self.rng.choice(running)
                self._log("preempt", request.request_id)
                require(self.scheduler.preempt(request.request_id), "a running request cannot be preempted")
        if self._chance("restart"):
            self._restart()

    def _abort(self, client: Client) -> None:
        request_id = client.request.request_id
        self._log("abort", request_id)
        aborted = self.scheduler.abort(request_id)
        require(aborted is client.request, f"request {request_id} is open and cannot be aborted")
        require(self.scheduler.abort(request_id) is None, f"request {request_id} can be aborted twice")
        client.ended = FinishReason.CANCELLED
        self.watch.ended(client.request)

    def _restart(self) -> None:
        """The engine dies with all its memory; what was delivered is all that is left of a request."""
        self._log("restart")
        interrupted = self._open_clients()
        self._start_engine()
        for client in interrupted:
            old = client.request
            client.request = Request(
                request_id=old.request_id,
                prompt_token_ids=list(old.prompt_token_ids),
                params=old.params,
                output_token_ids=client.tokens,
                choice=old.choice,
                priority=old.priority,
                tenant=old.tenant,
                cache_salt=old.cache_salt,
                arrival=old.arrival,
            )
            self._add(client.request)

    # ---- a step, as the engine core takes it ----

    def _schedule(self, only: int | None = None) -> StepPlan | None:
        self.watch.before_schedule()
        plan = self.scheduler.schedule() if only is None else self.scheduler.schedule(only=only)
        self.watch.after_schedule(self.scheduler, plan, alone=only is not None)
        return plan

    def _launch(self, plan: StepPlan) -> None:
        self.idle_ticks = 0
        self._log("plan", plan.step_id, partial(describe, plan, [p.request.num_known_tokens for p in plan.requests]))
        nan_rows = [planned.request.request_id for planned in plan.requests if self._chance("nan")]
        self.may_fail.update(nan_rows)
        launch = self.device.launch(
            plan,
            nan_rows=frozenset(nan_rows),
            raises=self._raises(plan) or self._chance("exception"),
            extra_draws=self.rng.randint(0, self.world.extra_draws),
        )
        self.launches.append(launch)

    def _raises(self, plan: StepPlan) -> bool:
        """Whether a request in this plan breaks every forward pass that it takes part in."""
        for planned in plan.requests:
            raises_from = self.clients[planned.request.request_id].arrival.raises_from
            if raises_from is not None and planned.start + planned.num_new_tokens > raises_from:
                return True
        return False

    def _execute_next(self) -> bool:
        """Let the device do its next step, in order; a failure is handled when the core sees it."""
        for launch in self.launches:
            if launch.error is not None:
                return False
            if launch.result is None:
                self.device.execute(launch)
                return True
        return False

    def _deliver(self) -> None:
        launch = self.launches[0]
        while launch.result is None and launch.error is None:
            self._execute_next()
        failed = next((other for other in self.launches if other.error is not None), None)
        if failed is not None and (failed is launch or self.rng.random() < 0.5):
            self._recover(failed)
            return
        self._refused_results()
        self.launches.popleft()
        assert launch.result is not None
        self._update(launch.result)
        if self._chance("doubled result"):
            self._refuse(launch.result)

    def _update(self, result: StepResult) -> None:
        self._log("result", result.step_id, [(row.request_id, row.token_ids, row.error) for row in result.rows])
        outputs = self.scheduler.update(result)
        self.watch.after_update(self.scheduler, result, outputs)
        for output in outputs:
            self._output(output)

    def _output(self, output: RequestOutput) -> None:
        request_id = output.request.request_id
        self.clients[request_id].receive(output)
        if output.finish_reason is not None:
            self._log("end", request_id, output.finish_reason, output.error)
            self.watch.ended(output.request)
        if output.finish_reason is FinishReason.ERROR:
            require(request_id in self.may_fail, f"request {request_id} fails for another one's fault: {output.error}")

    def _refused_results(self) -> None:
        """Results that are not due change nothing."""
        if self._chance("late result"):
            for launch in list(self.launches)[1:]:
                if launch.result is not None:
                    self._refuse(launch.result)
            self._refuse(StepResult(self.launches[0].plan.step_id + 7, ()))
            self._refuse(StepResult(self.launches[0].plan.step_id, ()))

    def _refuse(self, result: StepResult) -> None:
        before = self._fingerprint()
        try:
            self.scheduler.update(result)
        except ValueError:
            require(before == self._fingerprint(), f"a refused result of step {result.step_id} changed something")
        else:
            raise Violation(f"a result of step {result.step_id} was accepted, and it is not due")

    def _fingerprint(self) -> list[object]:
        s, pool = self.scheduler, self.scheduler.pool
        gauges = (s.num_running, s.num_waiting, s.num_in_flight, pool.num_free, pool.num_used, pool.num_cached)
        return [
            gauges,
            *(
                (
                    r.request_id,
                    r.status,
                    r.num_computed_tokens,
                    r.num_tokens,
                    len(r.output_token_ids),
                    tuple(r.block_ids),
                )
                for r in s.requests
            ),
        ]

    def _recover(self, failed: Launch) -> None:
        """The core's policy: undo the step, finish older ones, compute its requests alone; who fails alone, ends."""
        step_id = failed.plan.step_id
        self._log("exception", step_id)
        self.scheduler.rollback(step_id)
        self.watch.rolled_back(step_id)
        self._check()
        while self.launches[-1].plan.step_id != step_id:
            self.launches.pop()
        self.launches.pop()
        while self.launches:
            launch = self.launches.popleft()
            assert launch.result is not None
            self._update(launch.result)
        for planned in failed.plan.requests:
            request_id = planned.request.request_id
            plan = self._schedule(only=request_id)
            if plan is not None:
                self._run_alone(plan)

    def _run_alone(self, plan: StepPlan) -> None:
        (planned,) = plan.requests
        request_id = planned.request.request_id
        self._log("alone", plan.step_id, request_id)
        launch = self.device.launch(plan, raises=self._raises(plan))
        self.device.execute(launch)
        if launch.result is not None:
            self._update(launch.result)
            return
        self.may_fail.add(request_id)
        if self.rng.random() < 0.5:
            self._update(StepResult(plan.step_id, (RowResult(request_id, (), str(launch.error)),)))
        else:
            self.scheduler.rollback(plan.step_id)
            self.watch.rolled_back(plan.step_id)
            output = self.scheduler.fail(request_id, str(launch.error))
            assert output is not None
            self._output(output)

    def _check(self) -> None:
        self.scheduler.check_integrity()
        self.watch.check_cache(self.scheduler, self.device)


def describe(plan: StepPlan, num_known: list[int]) -> str:
    """A plan in one line: request[start..end of known] blocks."""
    rows = [
        f"{p.request.request_id}[{p.start}..{p.start + p.num_new_tokens}/{known}]@{list(p.block_ids)}"
        for p, known in zip(plan.requests, num_known, strict=True)
    ]
    preempted = f" preempted {list(plan.preempted_ids)}" if plan.preempted_ids else ""
    return " ".join(rows) + preempted


def run_seed(seed: int, make_scheduler: MakeScheduler = Scheduler) -> None:
    """Run one seed. Raises SimulationFailure with the last events."""
    simulation = Simulation(make_world(seed), make_scheduler)
    try:
        simulation.run()
    except Exception as error:
        events = [" ".join(str(part() if callable(part) else part) for part in event) for event in simulation.trace]
        raise SimulationFailure(
            f"seed {seed}: {type(error).__name__}: {error}\n"
            f"run it again: python -m tests.simulation --seed {seed}\n"
            f"{simulation.world.config}\n" + "\n".join(events)
        ) from error


def failures(seeds: tuple[int, int]) -> list[str]:
    """What goes wrong in the seeds from the first to before the second number."""
    messages = []
    for seed in range(*seeds):
        try:
            run_seed(seed)
        except SimulationFailure as failure:
            messages.append(str(failure))
    return messages

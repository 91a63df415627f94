"""Host a service on this machine: mount the model, start its jails, listen, keep the lease, stop cleanly.

The thin edge around `service`: sockets, processes and signals live here. On SIGTERM, Ctrl-C or a lost lease the server
stops taking questions, answers those under way, kills the jails and drops the keys.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import uvicorn

from cloister.broker.client import BrokerClient
from cloister.confine.launch import launch
from cloister.contract.model import Answer
from cloister.errors import CloisterError, InputError, MachineError, Reason
from cloister.node.admission import Admission
from cloister.node.lease import LeaseKeeper
from cloister.node.plan import Plan
from cloister.node.report import Report
from cloister.node.run import job_of
from cloister.node.signals import SIGNALS
from cloister.node.volumes import Mounted, mounted
from cloister.serve.answer import MAX_LABELS_BYTES, Rules, read_labels
from cloister.serve.pool import FRESH, JailedModel, Pool
from cloister.serve.service import Service, application

LABELS: Final = "labels.json"
LARGEST_ANSWER: Final = 4 << 20
"""Bytes of an encoded answer that fit into a reply."""
GRACE_S: Final = 30
"""How long answers under way are waited for when the service stops."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What a service did until it stopped."""

    answered: int
    refused: int


def rules_of(answer: Answer, volumes: Mounted) -> Rules:
    """Return how answers are shaped: the contract's `answer` table and the labels sealed with the model.

    Raises:
        InputError: no asset of the phase holds a usable `labels.json`, or more than one does.
    """
    having = {asset: root / LABELS for asset, root in volumes.paths.items() if (root / LABELS).is_file()}
    if not having:
        raise InputError(
            "the model says nothing about its labels",
            reasons=[Reason("model", "no labels.json", "a JSON array of label names beside the weights")],
            hint="let the training script write labels.json into its output",
        )
    if len(having) > 1:
        # else the owner of one asset could replace the labels of another
        raise InputError(
            "two assets of this phase say which labels there are",
            reasons=[Reason("model", f"labels.json in {' and '.join(having)}", "labels.json in one of them")],
            hint="keep it beside the weights only",
        )
    with next(iter(having.values())).open("rb") as file:
        labels = read_labels(file.read(MAX_LABELS_BYTES + 1))
    rules = Rules(answer.form, labels, answer.decimals, answer.pad or 0)
    if rules.size + 4 > LARGEST_ANSWER:
        raise InputError(
            "answers under this contract are too large",
            reasons=[Reason("answer.pad", f"{rules.size} bytes", f"at most {LARGEST_ANSWER - 4} bytes")],
            hint="a smaller `pad`, or fewer labels",
        )
    return rules


def serve(
    plan: Plan,
    admission: Admission,
    broker: BrokerClient,
    *,
    host: str,
    port: int,
    spares: int,
    timeout_s: float,
    ready: Callable[[str], None],
    report: Report,
    clock: Callable[[], datetime],
    stack: ExitStack,
) -> Counts:
    """Serve until a signal or the end of the lease; `stack` is closed by the caller.

    `ready` is called once with the address, when questions are welcome.

    Raises:
        InputError: the phase answers nobody, or the model has no labels.
        MachineError: the address is taken, or `lease-lost`.
    """
    answer = plan.contract.phase[plan.phase].answer
    if answer is None:
        raise InputError(f"phase '{plan.phase}' of contract '{plan.contract.name}' answers nobody: it has no `answer`")
    listener = stack.enter_context(_listen(host, port))
    volumes = stack.enter_context(mounted(plan.reads, admission.release, report))
    rules = rules_of(answer, volumes)
    job = job_of(plan, admission, volumes.paths, stdin="pipe", stdout="pipe", stderr="null")
    prepared = admission.prepared

    def start() -> JailedModel:
        return JailedModel(launch(job, prepared.profile, level=prepared.level))

    with report.step("starting the model's program") as step:
        pool = Pool(start, fresh=plan.sandbox in FRESH, spares=spares, timeout_s=timeout_s)
        stack.callback(pool.close)
        step.text = f"started {plan.code} in sandbox '{plan.sandbox}' at {prepared.level}"
    consumers = {plan.contract.party[name]: name for name in answer.to}
    service = Service(admission.release, prepared.attester, broker, pool, rules, consumers=consumers, clock=clock)
    server = _Server(
        uvicorn.Config(
            application(service, every=answer.every),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
    )

    def lost(error: CloisterError) -> None:
        server.should_exit = True
        pool.close()  # the model stops now, not when the last question is through

    keeper = stack.enter_context(
        LeaseKeeper(
            admission.release.lease,
            lambda: broker.renew(admission.release, prepared.attester).lease,
            asked=admission.asked,
            on_lost=lost,
        )
    )
    url = f"http://{listener.getsockname()[0]}:{listener.getsockname()[1]}"
    report.say(f"answering {', '.join(answer.to)} at {url} ({answer.form}); Ctrl-C stops it")
    ready(url)
    server.run(sockets=[listener])
    keeper.check()
    for fault in volumes.faults():
        report.warn(f"an input failed authentication: {fault}")
    return Counts(service.answered, service.refused)


class _Server(uvicorn.Server):
    """uvicorn that stops on a signal and leaves the process alive, so that jails, mounts and keys are cleaned up."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        old = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise MachineError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            code="busy",
            hint="another service uses the port; `--port 0` takes a free one",
        ) from error
    listener.listen(128)
    return listener

"""What a party hears while a phase runs: the words that the contract's `metrics_to` gives it, from the attested broker."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from cloister.cli.common import You, find_contract
from cloister.node.progress import read_line

if TYPE_CHECKING:
    from cloister.broker.client import BrokerClient
    from cloister.broker.wire import ListenPayload, WordsLine
    from cloister.node.report import BarLine

PERIOD_S: Final = 1.0
"""Nodes speak once a second."""


def show(you: You, broker: BrokerClient, reference: str, *, phase: str, follow: bool) -> None:
    """Print what left to you so far; with `follow` go on until every lease that spoke has ended.

    Raises:
        DeniedError: the contract gives it to somebody else, or to nobody.
    """
    contract = find_contract(reference, broker)
    ear = broker.listener(contract.id, you.signer(), phase=phase)
    lines = dropped = 0
    last: dict[str, tuple[dict[str, Any], str]] = {}
    bar_only = follow and you.ui.live
    with you.ui.bar(phase or contract.name, unit="share") as bar:
        while True:
            heard = ear.hear()
            phases = {lease.lease: lease.phase for lease in heard.leases}
            for line in heard.lines:
                data, text = _shown(line, phases.get(line.lease, ""))
                lines += 1
                if bar_only and line.stream == "metrics":
                    _draw(bar, line.text)
                    last[line.lease] = data, text
                else:
                    you.ui.record(data, text)
            if heard.more:
                continue
            if not follow or (heard.leases and not any(lease.live for lease in heard.leases)):
                break
            time.sleep(PERIOD_S)
    for data, text in last.values():
        you.ui.record(data, text)
    dropped = sum(lease.dropped for lease in heard.leases)
    if you.ui.as_json:
        you.ui.record({"leases": _leases(heard)}, "")
    elif not lines:
        you.ui.say("nothing was said yet; the broker keeps words in memory, for a day and until it restarts")
    elif dropped:
        you.ui.say(f"{dropped} lines are missing: more than is kept, or said while the broker was away")


def _draw(bar: BarLine, text: str) -> None:
    progress = read_line(text.encode())
    if progress is not None and progress.fraction is not None:
        bar.update(progress.fraction, 1.0, " ".join(f"{name} {value:g}" for name, value in progress.metrics.items()))


def _shown(line: WordsLine, phase: str) -> tuple[dict[str, Any], str]:
    from cloister.broker.relay import printable
    from cloister.broker.wire import format_time

    data: dict[str, Any] = {"lease": line.lease, "phase": phase, "stream": line.stream}
    data["text"] = printable(line.text)
    data["time"] = format_time(line.time)
    progress = read_line(line.text.encode()) if line.stream == "metrics" else None
    if progress is not None:
        data["metrics"] = progress.metrics
        data["counters"] = {counter.name: [counter.done, counter.total] for counter in progress.counters}
    mark = "" if line.stream == "metrics" else "│ "
    return data, f"{line.time:%H:%M:%S}Z {phase} {line.lease[:8]} {mark}{data['text']}"


def _leases(heard: ListenPayload) -> list[dict[str, Any]]:
    from cloister.broker.wire import format_time

    return [
        {
            "lease": lease.lease,
            "phase": lease.phase,
            "first": format_time(lease.first),
            "last": format_time(lease.last),
            "live": lease.live,
            "dropped": lease.dropped,
        }
        for lease in heard.leases
    ]

"""Appraise claims: does a relying party want what a verifier found authentic? A pure function of (claims, policy, today).

Rules, in this order; every violation is reported, each under `<policy.where>.<rule>`, those of a device under
`<policy.where>.<device>.<rule>` (`gpu0`, `gpu1`, `tpm0`, ...: each kind counts on its own):
   1 debug             a debuggable TEE or device is never acceptable, unless the policy says so
   2 kind              tee, attested-host or he
   3 accept            the TEE type; `simulated` stands for every soft TEE, and nothing else does; a service's word about a
                       device (`authority:...`) is refused unless the policy accepts that word
   4 TCB               `tcb_status`, `min_tcb` (year and month of the matched TCB level), `max_tcb_age`,
                       `min_svn.<name>` (floors for this TEE type), `deny_advisories`
   5 require.<name>    switches of the platform; `migrate_ma` and `migratable` are off unless the policy names them
   6 platforms         `platforms.allow`, `platforms.deny`: which machine it is
   7 gpu               `gpu`: `confidential` where the policy wants it, of every GPU; `gpus.allow`
   8 boot              `boot`: the boot state of an attested host; `boot_log`: a replayed log that explains it
   9 scheme            the parameters of homomorphic encryption
  10 reference_values  each named measurement is among the accepted values
  11 software          `software.<label>.<rule>`: one of the accepted builds; if it is none, what the closest one breaks
Absence refuses everywhere: a number, switch, measurement, id or date that the claims lack never meets a rule that names it,
an empty set of accepted values accepts nothing, software without a rule is no software, and `max_tcb_age` needs `today`.

Place kinds differ in what they have: `tee` has no rule 8 unless the policy lists boot values; `attested-host` has boot
values instead of a TCB, and refuses soft evidence without `simulated` like every place; of `he` only kind
and scheme are judged, because it holds no key and no hardware is trusted.

Hardware whose vendor publishes no TCB levels (`NOT_RATED`: SEV-SNP, Nitro, CCA) has no TCB date. `min_tcb` refuses it, unless
`min_svn` sets a floor above 0 for a number of its firmware (`types.FIRMWARE`): then the numbers stand for the date, because the
vendor's bulletins name numbers. Without either nothing would say that the firmware is new enough. `max_tcb_age` is never met by
it: a number does not age. Nor does its vendor name advisories, so `deny_advisories` says nothing about it. A service's token about
Intel's hardware could name them and does not, so `deny_advisories` refuses it.

Rules 1, 4 (`tcb_status`, `min_svn`, `deny_advisories`), 5 and the deny list hold for devices too. `min_svn` or `require` for a kind
of device refuses evidence without one. `tcb_status` takes `NOT_RATED` of every device: GPUs and TPMs have no other word. A soft
device makes everything soft.

Authenticity (signatures, chains, revocation, time) is `verify`'s job, freshness and identity are `check_binding`'s.

Not checked on purpose: a TCB date after `min_tcb` or after `today` is fine; the number of GPUs; the type of a boot event.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, datetime
from typing import Final, Protocol

from cloister.attestation.types import (
    AUTHORITY,
    FIRMWARE,
    IDENTITIES,
    NOT_RATED,
    Claims,
    LogRule,
    Policy,
    Software,
    base,
    below,
)
from cloister.errors import Reason

SIMULATED: Final = "simulated"
"""The word in `Policy.accept` that admits every soft TEE."""

GPU: Final = "nvidia-gpu"
"""TEE type of a device that computes; switches and TPMs are devices, too."""

DEVICES: Final = frozenset({GPU, "tpm"})
"""TEE types of devices that a policy can have rules for: a rule for one of them wants such a device."""

_UPDATE: Final = "update the platform's firmware and microcode, then attest again"
_SOFT: Final = "software evidence protects nothing: use real hardware"
_OTHER_BUILD: Final = "if this build is yours, add its measurement to the contract"
_OPENING: Final = ("migrate_ma", "migratable")
"""Attributes that let somebody beside the guest have its memory: an SNP migration agent or a TDX service TD, which the host
chooses and the launch measurement does not cover. Off, unless the policy says what it wants."""
_ADVISED: Final = frozenset({"sgx", "tdx", "azure-tdx"})
"""Hardware whose vendor names advisories for a platform."""
_LISTED: Final = 8
"""Accepted values named in one reason."""


class _Refuse(Protocol):
    def __call__(self, rule: str, found: str, wanted: str, hint: str = "") -> None: ...


def appraise(claims: Claims, policy: Policy, *, today: date | None = None) -> tuple[Reason, ...]:
    """Return every rule of `policy` that `claims` break, in rule order; empty means acceptable.

    `today` (UTC) is wanted by `max_tcb_age` only.

    Raises:
        ValueError: `today` is a time and not a day (a caller's mistake).
    """
    if isinstance(today, datetime):
        raise ValueError("`today` is a day, not a time")  # noqa: TRY004  # a caller's mistake, as a naive time is
    reasons: list[Reason] = []

    def refuse(rule: str, found: str, wanted: str, hint: str = "") -> None:
        reasons.append(Reason(f"{policy.where}.{rule}", found, wanted, hint))

    on_hardware = policy.kind != "he"
    devices = tuple(zip(device_names(claims), claims.devices, strict=True))

    # (1) before everything else: a debugger reads whatever the rest protects
    if on_hardware and not policy.debug:
        if claims.debug:
            refuse("debug", "a debuggable TEE", "debug off", "rebuild or restart the TEE without debug")
        for name, device in devices:
            if device.debug:
                refuse(f"{name}.debug", "a debuggable device", "debug off", "restart the device without debug")

    # (2)
    if claims.kind != policy.kind:
        refuse("kind", claims.kind, policy.kind)
    elif policy.kind == "attested-host" and claims.soft and SIMULATED not in policy.accept:
        # software is let in by its word only
        refuse("kind", _type(claims), "hardware", _SOFT)

    if on_hardware:
        _tee_type(claims, policy, refuse)
        for name, device in devices:
            if device.tee.startswith(AUTHORITY) and device.tee not in policy.accept:
                refuse(f"{name}.accept", device.tee, _list(policy.accept), "the device can show evidence of its own")
        _tcb(claims, policy, today, refuse)
        for name, device in devices:
            _device_tcb(name, device, policy, refuse)
        _require("", claims, policy, refuse)
        for name, device in devices:
            _require(f"{name}.", device, policy, refuse)
        _absent(claims, policy, refuse)
        _platforms(claims, policy, devices, refuse)
        _gpus(claims, policy, devices, refuse)
        _boot(claims, policy, refuse)

    # (9)
    if (policy.kind == "he" or policy.scheme is not None) and (policy.scheme is None or claims.scheme != policy.scheme):
        refuse("scheme", claims.scheme or "no scheme", policy.scheme or "nothing (the policy names no scheme)")

    if on_hardware:
        for rule, found, wanted in _measured(claims, policy.reference_values):  # (10)
            refuse(rule, found, wanted, _OTHER_BUILD)
        _software(claims, policy, refuse)
    return tuple(reasons)


def device_names(claims: Claims) -> tuple[str, ...]:
    """Return a name for each device, in order: `gpu0`, `gpu1`, `tpm0`, ...; each kind counts on its own."""
    seen: dict[str, int] = {}
    names = []
    for device in claims.devices:
        word = "gpu" if base(device.tee) == GPU else base(device.tee).rsplit("-", 1)[-1] or "device"
        names.append(f"{word}{seen.get(word, 0)}")
        seen[word] = seen.get(word, 0) + 1
    return tuple(names)


def identities(claims: Claims) -> tuple[str, ...]:
    """Return `name:value` of everything in `claims` that says which machine it is, then those of its devices in order."""
    return tuple(
        f"{name}:{one.platform[name]}"
        for one in (claims, *claims.devices)
        for name in sorted(one.platform)
        if name in IDENTITIES
    )


def _ids(claims: Claims) -> str:
    return ", ".join(f"{name}:{value}" for name, value in sorted(claims.platform.items()) if name in IDENTITIES)


def _type(claims: Claims) -> str:
    soft = [device.tee for device in claims.devices if device.soft]
    return f"{claims.tee} with {', '.join(soft)}" if soft else claims.tee


def _tee_type(claims: Claims, policy: Policy, refuse: _Refuse) -> None:
    # (3) soft and real never stand for each other, whatever the list says
    hardware = policy.accept - {SIMULATED}
    if policy.kind == "attested-host" and claims.soft:
        return  # judged in (2)
    accepted = SIMULATED in policy.accept if claims.soft else claims.tee in hardware
    if not accepted or not claims.tee:
        refuse("accept", _type(claims) or "no TEE", _list(policy.accept), _SOFT if claims.soft else "")


def _tcb(claims: Claims, policy: Policy, today: date | None, refuse: _Refuse) -> None:
    # (4)
    if policy.kind == "tee" and (not claims.tcb_status or claims.tcb_status not in policy.tcb_statuses):
        refuse("tcb_status", claims.tcb_status or "no status", _list(policy.tcb_statuses), _UPDATE)
    floors = policy.min_svn.get(base(claims.tee), {})
    if policy.min_tcb is not None:
        year, month = policy.min_tcb
        wanted = f"firmware of {year:04d}-{month:02d} or newer"
        if claims.tcb_date is not None:
            if (claims.tcb_date.year, claims.tcb_date.month) < policy.min_tcb:
                refuse("min_tcb", f"firmware of {claims.tcb_date:%Y-%m}", wanted, _UPDATE)
        elif claims.tcb_status != NOT_RATED:
            refuse("min_tcb", "no TCB date", wanted, _UPDATE)
        elif not any(least > 0 and name in FIRMWARE.get(below(claims.tee), ()) for name, least in floors.items()):
            hint = f"its vendor publishes no TCB dates: set min_svn for {base(claims.tee) or 'it'}"
            refuse("min_tcb", "no TCB date, and no floor above 0 for a number of its firmware", wanted, hint)
    if policy.max_tcb_age is not None:
        wanted = f"a TCB level at most {policy.max_tcb_age.days} days old"
        if claims.tcb_date is None:
            refuse("max_tcb_age", "no TCB date", wanted, _UPDATE)
        elif today is None:
            refuse("max_tcb_age", "nobody said which day it is", wanted)
        elif today - claims.tcb_date > policy.max_tcb_age:
            refuse("max_tcb_age", f"{(today - claims.tcb_date).days} days ({claims.tcb_date})", wanted, _UPDATE)
    _floors("", claims, floors, refuse)
    _advisories("", claims, policy, refuse)


def _device_tcb(name: str, device: Claims, policy: Policy, refuse: _Refuse) -> None:
    # (4)
    statuses = policy.tcb_statuses | {NOT_RATED}
    if not device.tcb_status or device.tcb_status not in statuses:
        refuse(f"{name}.tcb_status", device.tcb_status or "no status", _list(statuses), _UPDATE)
    _floors(f"{name}.", device, policy.min_svn.get(base(device.tee), {}), refuse)
    _advisories(f"{name}.", device, policy, refuse)


def _floors(at: str, claims: Claims, floors: Mapping[str, int], refuse: _Refuse) -> None:
    for name in sorted(floors):
        found = claims.svns.get(name)
        if found is None or found < floors[name]:
            said = "no such number" if found is None else str(found)
            refuse(f"{at}min_svn.{name}", said, f"{floors[name]} or more", _UPDATE)


def _advisories(at: str, claims: Claims, policy: Policy, refuse: _Refuse) -> None:
    for advisory in sorted(policy.deny_advisories.intersection(claims.advisories)):
        refuse(f"{at}deny_advisories", advisory, f"a platform without {advisory}", _UPDATE)
    if policy.deny_advisories and claims.tee.startswith(AUTHORITY) and below(claims.tee) in _ADVISED:
        wanted = "evidence that names the platform's advisories"
        refuse(f"{at}deny_advisories", "a token, which names no advisories", wanted)


def _require(at: str, claims: Claims, policy: Policy, refuse: _Refuse) -> None:
    # (5)
    wanted = {name: False for name in _OPENING if claims.attributes.get(name)} | dict(
        policy.require.get(base(claims.tee), {})
    )
    for name in sorted(wanted):
        found = claims.attributes.get(name)
        if found is not wanted[name]:
            said = "no such switch" if found is None else f"{name} is {_on(found)}"
            refuse(f"{at}require.{name}", said, f"{name} {_on(wanted[name])}", "set up the machine or its guest anew")


def _absent(claims: Claims, policy: Policy, refuse: _Refuse) -> None:
    # (4) (5) a device that is left out of the evidence meets no rule for it; of a GPU that is wanted, rule 7 says so
    there = {base(one.tee) for one in (claims, *claims.devices)} | ({GPU} if policy.gpu == "confidential" else set())
    for rule, rules in (("min_svn", policy.min_svn), ("require", policy.require)):
        for tee in sorted(DEVICES):
            if rules.get(tee) and tee not in there:
                wanted = f"evidence of {tee}, which {rule} has rules for"
                refuse(rule, f"no evidence of {tee}", wanted, "the evidence of the device is missing")


def _platforms(claims: Claims, policy: Policy, devices: tuple[tuple[str, Claims], ...], refuse: _Refuse) -> None:
    # (6)
    if policy.platform_allow is not None and policy.platform_allow.isdisjoint(claims.platform.items()):
        wanted = _list(frozenset(f"{name}:{value}" for name, value in policy.platform_allow))
        hint = "if this machine is yours, add its id"
        refuse("platforms.allow", _ids(claims) or "a machine without an id", wanted, hint)
    # tools write the same id in either case, and a list that denies must not miss one for that
    denied = {(name, value.casefold()) for name, value in policy.platform_deny}
    for at, one in (("", claims), *((f"{name}.", device) for name, device in devices)):
        for name, value in sorted(
            (name, value) for name, value in one.platform.items() if (name, value.casefold()) in denied
        ):
            refuse(f"{at}platforms.deny", f"{name}:{value}", "a machine that is not on the list")
    for name in sorted({name for name, _ in policy.platform_deny}):
        if name not in IDENTITIES:
            if name not in claims.platform and not any(name in device.platform for _, device in devices):
                refuse("platforms.deny", f"no {name}", f"evidence that shows {name}")
            continue
        for at, one in (("", claims), *((f"{which}.", device) for which, device in devices)):
            if name not in one.platform and below(one.tee) in IDENTITIES[name]:
                hint = "a machine that hides its id is not shown to be another one"
                refuse(f"{at}platforms.deny", f"no {name}", f"evidence that shows {name}", hint)


def _gpus(claims: Claims, policy: Policy, devices: tuple[tuple[str, Claims], ...], refuse: _Refuse) -> None:
    # (7)
    gpus = [(name, device) for name, device in devices if base(device.tee) == GPU or _vouched_gpu(device, policy)]
    if policy.gpu == "confidential":
        open_ = [name for name, device in gpus if device.gpu != "confidential"]
        if not gpus:
            refuse("gpu", "no evidence of a GPU", "confidential", "the evidence of the GPU is missing")
        elif open_ or claims.gpu != "confidential":
            found = f"{', '.join(open_) or 'a GPU'} not confidential"
            refuse("gpu", found, "confidential, every GPU", "switch its confidential computing mode on")
    if policy.gpu_allow is not None:
        wanted = _list(frozenset(f"{name}:{value}" for name, value in policy.gpu_allow))
        if not gpus:
            refuse("gpus.allow", "no evidence of a GPU", wanted)
        for name, device in gpus:
            if policy.gpu_allow.isdisjoint(device.platform.items()):
                refuse(
                    f"{name}.gpus.allow",
                    _ids(device) or "a GPU without an id",
                    wanted,
                    "if this GPU is yours, add its id",
                )


def _vouched_gpu(device: Claims, policy: Policy) -> bool:
    return device.tee.startswith(AUTHORITY) and below(device.tee) == GPU and device.tee in policy.accept


def _boot(claims: Claims, policy: Policy, refuse: _Refuse) -> None:
    # (8) an attested host is its boot state, so an empty list accepts nothing there
    if (policy.boot or policy.kind == "attested-host") and claims.boot not in policy.boot:
        hint = "measure the host again, or propose its state"
        refuse("boot", claims.boot or "no boot state", _list(policy.boot), hint)
    if policy.require_attested_boot and not claims.boot_log:
        refuse("boot_log", "no boot log", "a log that replays to the boot registers", "send the firmware's event log")


def _software(claims: Claims, policy: Policy, refuse: _Refuse) -> None:
    # (11) any one of them
    if not policy.software:
        return
    broken = [(software, tuple(_build(claims, software))) for software in policy.software]
    if any(not violations for _, violations in broken):
        return
    # the closest: the same hardware first, then the fewest violations; the first of equals
    closest, violations = min(broken, key=lambda one: (one[1][0][0] == "tee", len(one[1])))
    others = len(broken) - 1
    hint = f"{_OTHER_BUILD}; this is the closest of {len(broken)}" if others else _OTHER_BUILD
    for rule, found, wanted in violations:
        refuse(f"software.{closest.label}.{rule}", found, wanted, hint)


def _build(claims: Claims, software: Software) -> Iterator[tuple[str, str, str]]:
    """Yield (rule, found, wanted) of what `claims` break of one accepted build."""
    if software.tee and software.tee != base(claims.tee):
        yield "tee", base(claims.tee) or "no TEE", software.tee
    if not (software.measurements or software.svns_equal or software.svns_least or software.log):
        yield "rules", "software without a rule", "at least one rule: without one it would be any software"
    yield from _measured(claims, software.measurements)
    for name in sorted(software.svns_equal):
        number = claims.svns.get(name)
        if number is None or number != software.svns_equal[name]:
            yield name, "no such number" if number is None else str(number), str(software.svns_equal[name])
    for name in sorted(software.svns_least):
        number = claims.svns.get(name)
        if number is None or number < software.svns_least[name]:
            found = "no such number" if number is None else str(number)
            yield name, found, f"{software.svns_least[name]} or more"
    for rule in software.log:
        yield from _log(claims, rule)


def _log(claims: Claims, rule: LogRule) -> Iterator[tuple[str, str, str]]:
    where = f"log.{rule.register}.{rule.type}" if rule.type else f"log.{rule.register}"
    wanted = _list(frozenset(digest.hex() for digest in rule.digests))
    events = [event for event in claims.boot_log if event.register == rule.register]
    if rule.type:
        events = [event for event in events if event.type == rule.type]
    matching = [event for event in events if event.digest in rule.digests]
    strange = [event for event in events if event.digest not in rule.digests]
    if not matching:
        found = f"{len(events)} events, none of them" if events else "no such event"
        yield where, found, wanted
    if rule.only and strange:
        names = ", ".join(event.digest.hex() for event in strange[:_LISTED])
        yield where, f"{len(strange)} other events: {names}", f"only {wanted}"


def _measured(claims: Claims, values: Mapping[str, frozenset[bytes]]) -> Iterator[tuple[str, str, str]]:
    """Yield what differs; a measurement that is absent never equals an accepted value."""
    for name in sorted(values):
        value = claims.measurements.get(name)
        if value is None or value not in values[name]:
            wanted = _list(frozenset(each.hex() for each in values[name]))
            yield name, value.hex() if value is not None else "no such measurement", wanted


def _on(value: bool) -> str:
    return "on" if value else "off"


def _list(values: frozenset[str]) -> str:
    if not values:
        return "nothing (the list is empty)"
    more = f" or one of {len(values) - _LISTED} more" if len(values) > _LISTED else ""
    return " or ".join(sorted(values)[:_LISTED]) + more

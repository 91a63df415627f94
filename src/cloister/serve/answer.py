"""What a consumer may see of what a model said: the contract's answer form, enforced outside the jail.

The model's program is not trusted with the form: it prints scores, and this module lets through what the contract
says and nothing else. Steps, in this order:

  1 parse    one JSON object with `scores` {label: number} or `label`, at most 64 KiB
  2 labels   every name is one of the labels that were sealed with the model; anything else refuses
  3 form     `label`: the best label; `score`: the best label and its score; `full`: every label and score
  4 round    scores to `decimals`, if the contract has them; then a score lies between 0 and 1
  5 pad      the encoded answer always has the same size for one contract, whatever it says

Pure functions; nothing is read or written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from cloister.crypto.canonical import cbor_decode, cbor_encode
from cloister.errors import InputError, PeerError

AnswerForm = Literal["label", "score", "full"]

MAX_LINE_BYTES: Final = 64 * 1024
MAX_LABELS: Final = 1000
"""As many as ImageNet's classes: one label-only answer carries at most 10 bits."""
MAX_LABEL_BYTES: Final = 64
MAX_LABELS_BYTES: Final = 1 << 18
"""Largest labels.json, 256 KiB."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The contract's `answer` table as far as it shapes one answer.

    `labels` come from `labels.json` of the sealed model, so a program cannot invent a label to carry data.
    """

    form: AnswerForm
    labels: tuple[str, ...]
    decimals: int | None = None
    pad: int = 0
    """Minimal size of the encoded answer in bytes."""

    @property
    def size(self) -> int:
        """Bytes of every encoded answer under these rules: the largest possible one, or `pad` if that is more."""
        longest = max(self.labels, key=lambda label: len(label.encode()))
        if self.form == "full":
            worst = _body({"label": longest, "scores": dict.fromkeys(self.labels, 0.1)})
        elif self.form == "score":
            worst = _body({"label": longest, "score": 0.1})
        else:
            worst = _body({"label": longest})
        return max(len(worst), self.pad)


def read_labels(data: bytes) -> tuple[str, ...]:
    """Return the labels in the bytes of a model's `labels.json`: a JSON array of distinct short strings.

    Raises:
        InputError: not such an array.
    """
    wanted = f"a JSON array of 1 to {MAX_LABELS} distinct strings of at most {MAX_LABEL_BYTES} bytes"
    try:
        labels = json.loads(data if len(data) <= MAX_LABELS_BYTES else b"")
    except (ValueError, RecursionError) as error:
        raise InputError(f"labels.json of the model is not JSON; wanted {wanted}") from error
    if (
        not isinstance(labels, list)
        or not 1 <= len(labels) <= MAX_LABELS
        or not all(isinstance(label, str) and 0 < _size(label) <= MAX_LABEL_BYTES for label in labels)
        or len(set(labels)) != len(labels)
    ):
        raise InputError(f"labels.json of the model is not usable; wanted {wanted}")
    return tuple(labels)


def _size(label: str) -> int:
    """Bytes of a label in UTF-8; 0 for half a surrogate pair, which has none."""
    try:
        return len(label.encode())
    except UnicodeEncodeError:
        return 0


def shape(line: bytes, rules: Rules) -> dict[str, Any]:
    """Return the part of the model's `line` that the contract lets out.

    Raises:
        PeerError: (code `protocol`) the program printed something else than an answer about its own labels.
    """
    # 1 parse
    try:
        said = json.loads(line) if len(line) <= MAX_LINE_BYTES else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise PeerError("the model did not answer with one JSON object on one line", code="protocol")
    # 2 labels
    scores = said.get("scores")
    if scores is None and said.get("label") in rules.labels and rules.form == "label":
        return {"label": said["label"]}
    if not isinstance(scores, Mapping) or not scores or not all(isinstance(name, str) for name in scores):
        raise PeerError(f"the model gave no scores; the contract's form is '{rules.form}'", code="protocol")
    if not set(scores) <= set(rules.labels):
        raise PeerError("the model answered with a label that was not sealed with it", code="protocol")
    values: dict[str, float] = {}
    for name in rules.labels:
        value = scores.get(name, 0.0)
        number = _number(value)
        if not math.isfinite(number):
            raise PeerError("the model gave a score that is not a finite number", code="protocol")
        if rules.form != "label" and rules.decimals is not None and not 0 <= number <= 1:
            # `decimals` bounds what one score can carry only together with a range
            raise PeerError("the model gave a score outside 0 to 1", code="protocol")
        values[name] = number
    # 3 form, 4 round
    best = max(rules.labels, key=lambda name: values[name])
    if rules.form == "label":
        return {"label": best}
    if rules.form == "score":
        return {"label": best, "score": _rounded(values[best], rules.decimals)}
    return {"label": best, "scores": {name: _rounded(value, rules.decimals) for name, value in values.items()}}


def _number(value: object) -> float:
    """The score that a program printed; not a number for what is none, or is too large for one."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _rounded(value: float, decimals: int | None) -> float:
    return value if decimals is None else round(value, decimals)


def _body(answer: Mapping[str, Any]) -> bytes:
    # Scores travel as CBOR float64 (9 bytes each) whatever their value: cbor2's canonical form would shorten some.
    flat: dict[str, Any] = {"label": answer["label"]}
    if "score" in answer:
        flat["score"] = _fixed(answer["score"])
    if "scores" in answer:
        flat["scores"] = {name: _fixed(value) for name, value in answer["scores"].items()}
    return cbor_encode(flat)


def _fixed(value: float) -> bytes:
    return repr(float(value)).encode().ljust(24)


def encode(answer: Mapping[str, Any], *, size: int) -> bytes:
    """Return `answer` in exactly `size` + 4 bytes: u32 length, CBOR, zeros (step 5).

    Raises:
        ValueError: it does not fit; `Rules.size` always does.
    """
    body = _body(answer)
    if len(body) > size:
        raise ValueError(f"answer of {len(body)} bytes does not fit into {size}")
    return len(body).to_bytes(4, "big") + body.ljust(size, b"\x00")


def decode(data: bytes) -> dict[str, Any]:
    """Inverse of `encode`, for the client.

    Raises:
        PeerError: (code `protocol`) not such an encoding.
    """
    try:
        length = int.from_bytes(data[:4], "big")
        if length > len(data) - 4 or any(data[4 + length :]):
            raise ValueError("length")
        answer = cbor_decode(data[4 : 4 + length])
        if "score" in answer:
            answer["score"] = float(answer["score"])
        if "scores" in answer:
            answer["scores"] = {name: float(value) for name, value in answer["scores"].items()}
        if not isinstance(answer["label"], str):
            raise TypeError("label")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PeerError("the service sent an answer that this version does not understand", code="protocol") from error
    return dict(answer)

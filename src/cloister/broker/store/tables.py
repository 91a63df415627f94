"""The tables: the log itself, its signed head, and one table for each row type of the fold.

    log_entries      entry | body                      the entries, canonical JSON
    log_head         origin | log_key | checkpoint | sealed_seed     one row: who the log is and its last signed head
    kept_secrets     name | sealed                     secrets of the broker that are not in the log (TLS key and so on)
    contracts, signatures, deposited_keys, asset_roots, leases, answer_counts, denials, epochs, witnesses,
    collateral_marks
                     columns = the fields of the row type in `cloister.broker.log.fold`, plus its payload column

Columns are derived from the row types, so a table cannot say anything that the fold does not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, RowMapping, Table, Text
from sqlalchemy.types import TypeEngine

from cloister.broker.log.fold import ROWS, Row
from cloister.broker.log.leaf import format_time, parse_time

FORMAT: Final = 1
"""SQLite `user_version` of a state folder that this code reads and writes."""

METADATA: Final = MetaData()

LOG_ENTRIES: Final = Table(
    "log_entries",
    METADATA,
    Column("entry", Integer, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
    sqlite_strict=True,
)
LOG_HEAD: Final = Table(
    "log_head",
    METADATA,
    Column("only", Integer, primary_key=True, autoincrement=False),
    Column("origin", Text, nullable=False),
    Column("log_key", Text, nullable=False),
    Column("checkpoint", LargeBinary, nullable=False),
    Column("sealed_seed", LargeBinary, nullable=False),
    sqlite_strict=True,
)
KEPT_SECRETS: Final = Table(
    "kept_secrets",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
    sqlite_strict=True,
    sqlite_with_rowid=False,
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """How one Python type of a row field lies in a column."""

    column: Callable[[], TypeEngine[Any]]
    to_sql: Callable[[Any], Any] = lambda value: value
    from_sql: Callable[[Any], Any] = lambda value: value


_KINDS: Final[Mapping[Any, _Kind]] = MappingProxyType(
    {
        str: _Kind(Text),
        int: _Kind(lambda: BigInteger().with_variant(Integer(), "sqlite")),
        bytes: _Kind(LargeBinary),
        bool: _Kind(Integer, int, lambda value: {0: False, 1: True}[value]),
        datetime: _Kind(Text, format_time, parse_time),
        tuple[str, ...]: _Kind(Text, json.dumps, lambda value: tuple(json.loads(value))),
    }
)


def _kinds(cls: type[Row]) -> tuple[tuple[str, _Kind], ...]:
    hints = get_type_hints(cls)
    return tuple((field.name, _KINDS[hints[field.name]]) for field in dataclasses.fields(cls))


_FIELDS: Final[Mapping[type[Row], tuple[tuple[str, _Kind], ...]]] = MappingProxyType({cls: _kinds(cls) for cls in ROWS})


def _table(cls: type[Row]) -> Table:
    columns = [
        Column(name, kind.column(), primary_key=name in cls.KEY, nullable=False, autoincrement=False)
        for name, kind in _FIELDS[cls]
    ]
    if cls.PAYLOAD:
        columns.append(Column(cls.PAYLOAD, LargeBinary, nullable=False))
    return Table(cls.TABLE, METADATA, *columns, sqlite_strict=True, sqlite_with_rowid=False)


TABLES: Final[Mapping[type[Row], Table]] = MappingProxyType({cls: _table(cls) for cls in ROWS})
"""The table that mirrors each row type."""


def to_columns(row: Row) -> dict[str, Any]:
    """Return the column values of `row`, without its payload."""
    return {name: kind.to_sql(getattr(row, name)) for name, kind in _FIELDS[type(row)]}


def from_columns(cls: type[Row], columns: RowMapping) -> Row:
    """Return the row of column values.

    Raises:
        ValueError: a value that no row has.
    """
    try:
        return cls(**{name: kind.from_sql(columns[name]) for name, kind in _FIELDS[cls]})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} in a column") from error

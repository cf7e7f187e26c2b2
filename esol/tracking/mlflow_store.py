"""MLflow's ways: the names that it takes, what it refuses for good, and where its own store says that files are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import sqlite3
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

STATE = "mlflow.json"  # in the run directory: how far it was sent, and where to
BESIDE = "beside the runs"  # the default store, wherever the runs are moved
_LOG = logging.getLogger(__name__)
NAME, PARAM, TAG, DATASET, DIGEST = 250, 6000, 8000, 500, 36  # MLflow's limits, in characters

_PLACES = (("runs", "run_uuid", "artifact_uri"), ("logged_models", "model_id", "artifact_location"))
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST")


def own_store(runs: Path) -> tuple[str, str]:
    """The addresses of the store that esol keeps beside its runs, and of its artifacts."""
    return f"sqlite:///{runs / 'mlflow.db'}", (runs / "mlartifacts").as_uri()


def mlflow_name(name: str) -> str:
    """A metric's, parameter's or tag's name as MLflow takes it, different for different names.

    Letters, digits, and _ - . / and spaces stay; other signs become _, as do parts that a path would swallow, and a
    hash tells such names apart from those that were so from the start. At most 250 characters.
    """
    parts = re.sub(r"[^\w.\- /]", "_", name).split("/")
    allowed = "/".join("_" if part in ("", ".") or part.startswith("..") else part for part in parts)
    if allowed == name and len(name) <= NAME:
        return name
    return f"{allowed[: NAME - 9]}_{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def for_good(error: Exception) -> bool:
    """Whether MLflow will refuse this record however often it is sent: the record is at fault, not the server."""
    if isinstance(error, json.JSONDecodeError):  # a garbled answer of the server's
        return False
    code = getattr(error, "error_code", "")
    return (
        isinstance(error, (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, PermissionError))
        or code in _REFUSALS
    )


def follow_the_move(database: Path, artifacts: str) -> None:
    """Where the runs were moved, their database still names the old place of pictures and models: puts the new one in.

    MLflow stores absolute addresses and has no call to change them. Only the database that esol keeps beside its runs
    is changed; of earlier runs only those whose artifacts have come along.
    """
    if not database.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=30)) as store, store:
            for (old,) in store.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall():
                if (
                    isinstance(old, str)
                    and old.startswith("file:")
                    and old.endswith("/mlartifacts")
                    and old != artifacts
                ):
                    moved = "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?"
                    store.execute(moved, (artifacts, old))
            there = {name for (name,) in store.execute("SELECT name FROM sqlite_master")}
            for table, key, column in (place for place in _PLACES if place[0] in there):
                for run, uri in store.execute(f"SELECT {key}, {column} FROM {table}").fetchall():
                    place, found, inside = str(uri).rpartition("/mlartifacts/")
                    if not found or not place.startswith("file:") or f"{place}/mlartifacts" == artifacts:
                        continue
                    gone = not Path(url2pathname(urlsplit(uri).path)).exists()  # a run without a picture has no folder
                    if gone or (database.parent / "mlartifacts" / inside).exists():
                        moved = f"UPDATE {table} SET {column} = ? WHERE {key} = ?"
                        store.execute(moved, (f"{artifacts}/{inside}", run))
    except sqlite3.DatabaseError as error:
        if "no such table" not in str(error):  # MLflow makes its tables on first use
            _LOG.warning("%s still names the old place of the pictures: %s", database, error)
            print(
                f"{database} still names the old place of the pictures ({error}); try again when it is free", flush=True
            )

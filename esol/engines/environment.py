"""What launchers put into the environment, and what of it was left behind by something else."""

from __future__ import annotations

import logging
import os
import resource

from esol.base.errors import LaunchError

_LOG = logging.getLogger(__name__)
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MPI = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # mpirun sets no others, accelerate reads these


def given() -> str:
    """The variables with their values, for messages."""
    return " ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in VARIABLES)


def check_environment() -> None:
    """LaunchError where the environment speaks of a job that no launcher can have meant: it would be waited for.

    Every launcher gives a process of several all four of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Some of them
    alone that say no more than "one process" are taken out of the environment.
    """
    numbers = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    if not numbers or os.environ.keys() & set(_MPI):
        return
    remedy = (
        "to run one process, unset RANK WORLD_SIZE LOCAL_RANK; to run several, start them by torchrun or accelerate "
        "launch (launch/README.md)"
    )
    try:
        values = {name: int(text) for name, text in numbers.items()}
    except ValueError as error:
        raise LaunchError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, not {given()}: {remedy}") from error
    rank, size, local = values.get("RANK", 0), values.get("WORLD_SIZE", 1), values.get("LOCAL_RANK", 0)
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if not 0 <= rank < size and not missing:
        raise LaunchError(f"RANK={rank} is no process of WORLD_SIZE={size}: {remedy}")
    if missing and size == 1 and rank == 0 and local in (0, -1):
        for name in numbers:
            del os.environ[name]
    elif missing:
        said = " ".join(f"{name}={text}" for name, text in numbers.items())
        raise LaunchError(
            f"{said} without {', '.join(missing)}: something else left it in the environment; {remedy}. "
            f"This process was given {given()}"
        )


def allow_connections() -> None:
    """Raises this process's own limit of open files to what its connections in a job of hundreds need.

    gloo connects every rank to every other, in two groups, and each rank asks the store of rank 0 over two connections.
    """
    needed = 1024 + 4 * int(os.environ.get("WORLD_SIZE", "1"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        _LOG.warning("this job may need %d open files, but this machine allows %d: raise ulimit -Hn", needed, allowed)

"""What all tests share: JAX strict and on the CPU, no display, and the real PercePiano data where
there is any."""

import contextlib
import logging
import os

# Before anything imports jax or matplotlib. Matrix products in full float32, so that parity holds
# to 1e-5 on any machine; arrays of unequal rank never broadcast silently.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest

import percepiano_ast  # noqa: F401 (sets flags of XLA, which are read once)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def percepiano_dir() -> Path:
    """Folder of the real PercePiano data: ``PERCEPIANO_DIR``, else ``../shared/percepiano`` beside
    the repository.

    Without it the test is skipped with that reason; under ``CI`` or with a wrong ``PERCEPIANO_DIR``
    it fails instead.
    """
    named = os.environ.get("PERCEPIANO_DIR")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "percepiano"
    if folder.is_dir():
        return folder
    reason = f"PercePiano is not at {folder}: set PERCEPIANO_DIR to the folder that holds it"
    if named or os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def log_lines():
    """Messages that the package logs meanwhile, progress included."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("percepiano_ast")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def logged():
    """Messages that the package logs during a test, progress included."""
    with log_lines() as lines:
        yield lines


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Starts trainings that are to be killed, or to meet places that fail; see `failing`."""
    from failing import Nursery
    from tiny import compiled_once

    with compiled_once(tmp_path_factory.getbasetemp() / "compiled by children") as variables:
        nursery = Nursery(variables)
        yield nursery
        nursery.close()

"""Dry runs: real compilations for TPUs that are not there. 60 s; the slow ones compile for more of
them, and what does not fit."""

import dataclasses
import importlib.util
import os

import pytest
from tiny import MODEL, PRETRAIN

from percepiano_ast.config import PRESETS, ComputeConfig, Preset
from percepiano_ast.errors import InputError
from percepiano_ast.training import dryrun

BASE = PRESETS["base"]
BATCH = 1024  # of a tiny model: enough that activations, not parameters, take the memory


@pytest.fixture
def libtpu() -> None:
    """Without libtpu the test is skipped with that reason; under ``CI`` it fails instead."""
    if importlib.util.find_spec("libtpu") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "libtpu is not installed: pip install 'jax[tpu]'"
        )


def small(batch_size: int = 64, **compute) -> Preset:
    """The base preset around the tests' tiny model."""
    config = dataclasses.replace(PRETRAIN, batch_size=batch_size)
    return dataclasses.replace(BASE, model=MODEL, pretrain=config, compute=ComputeConfig(**compute))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_would(libtpu, monkeypatch):
    whole = dryrun.dry_run(small(BATCH), "v5e-1")
    assert 0 < whole.temporaries < whole.peak <= whole.memory == 15.75 * 2**30
    assert whole.arguments > whole.outputs, "the state that goes in is not given back in its place"
    # A chip with a little less memory than that.
    place = dataclasses.replace(dryrun.TARGETS["v5e-1"], memory=whole.peak - 1)
    monkeypatch.setitem(dryrun.TARGETS, "v5e-1", place)
    with pytest.raises(InputError) as refused:
        dryrun.dry_run(small(BATCH), "v5e-1")
    assert str(refused.value).startswith(
        f"batch {BATCH} needs {whole.peak / 2**30:.2f} GiB per device on v5e-1, which has "
    )
    assert "Choose --accum-steps 2 (compiled: " in str(refused.value)


def test_a_batch_that_the_devices_do_not_divide(libtpu):
    with pytest.raises(
        InputError, match="v5e-8: a batch of 36 is not divisible by 8 devices x 1 micro-batches"
    ):
        dryrun.dry_run(small(36), "v5e-8")


def test_an_unknown_target():
    with pytest.raises(
        InputError,
        match="unknown target 'v5e-2'. Did you mean 'v5e-.'. Choose one of: v5e-1, v6e-1",
    ):
        dryrun.dry_run(BASE, "v5e-2")


def test_without_libtpu_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"needs libtpu. Install it with: pip install 'jax\[tpu\]==\d"
    ):
        dryrun.dry_run(BASE, "v5e-1")


@pytest.mark.parametrize(
    "message, needs",
    [
        # As libtpu writes them.
        (
            (
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory"
                " space hbm. Used 40.00G of 15.75G hbm. Exceeded hbm capacity by 24.25G."
            ),
            "40.00 GiB",
        ),
        (
            (
                "RESOURCE_EXHAUSTED: Allocation (size=24536678400) would exceed memory"
                " (size=17179869184) :: #allocation606"
            ),
            "22.85 GiB for a single array",
        ),
    ],
)
def test_what_the_compiler_says_is_understood(message, needs):
    assert dryrun._exceeded(message) == needs


def test_hours_are_those_of_the_published_peak():
    made = {"arguments": 2, "outputs": 1, "temporaries": 3, "compile_seconds": 1.0}
    one, eight = (dryrun.DryRun(BASE, target, **made) for target in ("v5e-1", "v5e-8"))
    # 12 blocks of 12 x 768^2 weights on 514 tokens, three times forward, and a little beside them.
    assert 3 * 2 * 12 * 12 * 768**2 * 514 < one.clip_flops < 1.25 * 3 * 2 * 12 * 12 * 768**2 * 514
    clips = 40 * 200 * 3600 / BASE.front_end.seconds(1024)
    assert (
        one.hours
        == pytest.approx(clips * one.clip_flops / (0.3 * 197e12) / 3600)
        == pytest.approx(8 * eight.hours)
    )
    assert "an estimate from the peak, not a measurement" in str(one)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(name, marks=() if name == "v5e-1" else pytest.mark.slow)
        for name in dryrun.TARGETS
    ],
)
def test_base_fits_everywhere_with_room_to_spare(libtpu, target):
    assert dryrun.dry_run(BASE, target).peak < 14 * 2**30


@pytest.mark.slow
def test_without_remat_base_needs_accumulation(libtpu):
    without = dataclasses.replace(BASE, compute=ComputeConfig())
    with pytest.raises(
        InputError,
        match=r"batch 128 needs 22.85 GiB for a single array .* Choose --accum-steps \d+ ",
    ):
        dryrun.dry_run(without, "v5e-1")

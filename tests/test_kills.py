"""Trainings that are killed, at random instants and at chosen points: they go on from their newest
checkpoint, bit for bit.

Cost: about 30 s, most of it children that start; the slow ones, with a hundred random kills, take
10 min.
"""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from failing import EPOCHS, LOOK_EVERY, STEPS, Nursery, Training, other_lock
from safetensors.numpy import load_file
from tiny import bits, compiled_once, without_seconds

from percepiano_ast.training.checkpoints import listing, open_latest

POINTS = (
    "while the local file is written",
    "after the local file is written",
    "while it is copied",
    "while it is read back",
    "before the manifest",
    "while the manifest is written",
    "after the manifest",
    "between deletions",
    "between emptying and deletion",
)
POINTS_OF_LOADING = ("while loading fetches", "after loading fetches", "while loading reads")


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory) -> dict:
    """What an uninterrupted run ends with."""
    training = Training(nursery, tmp_path_factory.mktemp("whole"))
    training.finish()
    assert training.started_from() == 0
    assert len(losses_of_steps(training)) == EPOCHS * STEPS // LOOK_EVERY
    return {**outcome(training), "steps.csv": losses_of_steps(training)}


def outcome(training: Training) -> dict:
    """All that a run ends with and that does not depend on the clock; ``steps.csv`` is
    `losses_of_steps`."""
    tree, description = open_latest(training.store, made_by="")
    return {
        "step": description["step"],
        "state": bits(tree),
        "history": without_seconds(description["history"]),
        "history.csv": without_seconds(rows(training.out / "history.csv")),
    }


def intact(place: Path) -> list[dict]:
    """The manifests of all checkpoints there, none of which is damaged."""
    found = listing(place, damaged := [])
    assert not damaged
    return found


def losses_of_steps(training: Training) -> dict[str, dict]:
    """The rows of ``steps.csv`` by step."""
    return {row["step"]: row for row in without_seconds(rows(training.out / "steps.csv"))}


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def go_on(training: Training, **changes) -> int:
    """Start once more; exit code, after a look at where it went on from: the newest checkpoint,
    nothing else."""
    newest = training.newest()
    code = training.run(**changes)
    assert training.started_from() in (None, newest), training.printed()
    assert "damaged" not in training.printed()
    return code


def assert_clean(training: Training) -> None:
    """Nothing is left but what shall stay."""
    kept = intact(training.store)
    names = {re.sub(r"\.[0-9a-f]{8}\.", ".", path.name) for path in training.store.iterdir()}
    assert names == {
        f"step_{one['step']:08d}.{kind}" for one in kept for kind in ("json", "p0.safetensors")
    }
    assert len(list(training.store.iterdir())) == len(names) and 2 <= len(kept) <= 3
    assert os.listdir(training.temporary) == []
    assert not list(training.out.rglob("*.partial")) and not (training.out / "stopped").exists()


def assert_as_whole(training: Training, whole: dict) -> None:
    for name, value in outcome(training).items():
        assert value == whole[name], name
    noted = losses_of_steps(training)
    assert noted == {step: whole["steps.csv"][step] for step in noted}
    assert_clean(training)


def kill_at_random(training: Training, rng: random.Random) -> bool:
    """Start and kill: while it starts, loads and compiles, or, half of the time, trains; False
    where it ended before."""
    newest, when = training.newest(), rng.choice(["", "from", "trains", "trains"])
    training.start(pause=0.02)
    if newest < EPOCHS * STEPS:
        training.until(
            lambda: not when or any(event.startswith(when) for event in training.events())
        )
    time.sleep(rng.uniform(0, 1.5))
    training.kill()
    code = training.wait()
    assert code in (0, -signal.SIGKILL), training.printed()
    assert training.started_from() in (None, newest), training.printed()
    assert training.newest() >= newest and "damaged" not in training.printed()
    return code != 0


def killed_often(nursery: Nursery, home: Path, whole: dict, kills: int, seed: int) -> list[int]:
    """So many kills, over as many runs as they take; how often each run was killed."""
    rng, each = random.Random(seed), []
    while sum(each) < kills:
        training, count = Training(nursery, home / f"run_{len(each)}"), 0
        while sum(each) + count < kills and kill_at_random(training, rng):
            count += 1
        assert go_on(training) == 0, training.printed()
        assert_as_whole(training, whole)
        each.append(count)
    return each


@pytest.mark.slow
def test_killed_ten_times_at_random_it_ends_as_if_it_never_was(nursery, whole, tmp_path):
    assert sum(killed_often(nursery, tmp_path, whole, 10, seed=0)) == 10


@pytest.mark.slow
def test_killed_a_hundred_times_at_random_it_ends_as_if_it_never_was(nursery, whole, tmp_path):
    each = killed_often(nursery, tmp_path, whole, 100, seed=1)
    print(f"kills of each run: {each}")
    assert sum(each) == 100 and len(each) > 3


@pytest.mark.slow
def test_killed_once_at_every_point_in_one_run(nursery, whole, tmp_path):
    training = Training(nursery, tmp_path)
    assert training.run(aim=["after the manifest", 1], pause=0.02) == -signal.SIGKILL, (
        training.printed()
    )
    for point in (*POINTS, *POINTS_OF_LOADING):
        # As far as it was, or one checkpoint further: what had been kept is never lost.
        newest = training.newest()
        assert go_on(training, aim=[point, 0], pause=0.02) == -signal.SIGKILL, (
            f"{point}: {training.printed()}"
        )
        assert newest <= training.newest() < EPOCHS * STEPS
    assert go_on(training) == 0, training.printed()
    assert_as_whole(training, whole)


@pytest.mark.slow
def test_a_kill_within_an_epoch_loses_no_row_of_steps(nursery, whole, tmp_path):
    training = Training(nursery, tmp_path)
    assert training.run(aim=["after the manifest", 0], pause=0.02) == -signal.SIGKILL, (
        training.printed()
    )
    assert 0 < training.newest() < STEPS
    assert go_on(training) == 0, training.printed()
    assert losses_of_steps(training) == whole["steps.csv"]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("skip", [0, 2, 5])
def test_killed_at_a_point_of_saving(nursery, whole, tmp_path, point, skip):
    training = Training(nursery, tmp_path)
    assert training.run(aim=[point, skip], pause=0.02) == -signal.SIGKILL, training.printed()
    assert training.started_from() == 0
    # Complete ones stand there as soon as there was a second, whatever was going on.
    kept = intact(training.store) if training.store.exists() else []
    assert len(kept) >= min(skip, 2)
    assert go_on(training) == 0, training.printed()
    assert_as_whole(training, whole)


@pytest.fixture(scope="module")
def half(nursery, tmp_path_factory) -> Training:
    """A run that was killed with checkpoints and incomplete files of every kind behind it."""
    training = Training(nursery, tmp_path_factory.mktemp("half"))
    for point, skip in (
        ("between deletions", 1),
        ("while the local file is written", 1),
        ("while it is copied", 2),
    ):
        assert training.run(aim=[point, skip], pause=0.02) == -signal.SIGKILL, training.printed()
    assert 0 < training.newest() < EPOCHS * STEPS
    assert os.listdir(training.temporary) and any(
        ".partial" in path.name for path in training.store.iterdir()
    )
    return training


@pytest.mark.slow
def test_killed_while_it_starts_again(half, whole):
    """Again and again: nothing is lost, and nothing piles up."""
    newest = half.newest()
    for point in ("while incomplete files are removed", *POINTS_OF_LOADING):
        assert half.run(aim=[point, 0]) == -signal.SIGKILL, f"{point}: {half.printed()}"
        assert half.started_from() is None and half.newest() == newest
    assert go_on(half) == 0, half.printed()
    assert_as_whole(half, whole)


# --- Folds --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def five(nursery, tmp_path_factory) -> list[str]:
    """Checksums of the parameters of five folds, trained without interruption."""
    training = Training(nursery, tmp_path_factory.mktemp("five"), {"work": "folds"})
    training.finish()
    return (training.home / "folds").read_text().splitlines()


def fold_store(training: Training, number: int, kind: str) -> list[dict]:
    return intact(training.out / f"fold_{number}" / kind)


# A fold has six saves and its model's. Most of these hit the second or third fold.
AIMS = [
    ("while it is copied", 11),
    ("before the manifest", 8),
    ("while the manifest is written", 15),
    ("between deletions", 9),
    ("when the model is there", 1),
    ("while the local file is written", 4),
]


@pytest.mark.slow
@pytest.mark.parametrize("point, skip", AIMS)
def test_five_folds_go_on_in_fold_and_epoch(nursery, five, tmp_path, point, skip):
    training = Training(nursery, tmp_path, {"work": "folds"})
    assert training.run(aim=[point, skip]) == -signal.SIGKILL, training.printed()
    last = int(training.events()[-1].split()[1])
    done = [number for number in range(5) if fold_store(training, number, "model")]
    assert done == list(range(len(done))) and len(done) in (last, last + 1)
    reached = max((one["step"] for one in fold_store(training, last, "checkpoints")), default=0)
    assert training.run() == 0, training.printed()
    # A fold with a checkpoint of its last step, 6, has only its model to write.
    expected = [
        f"fold {number} from {reached if number == last else 0}"
        for number in range(len(done), 5)
        if (number, reached) != (last, 6)
    ]
    assert training.events() == expected
    assert (training.home / "folds").read_text().splitlines() == five
    assert_folds_clean(training)


@pytest.mark.slow
def test_five_folds_killed_at_random(nursery, five, tmp_path):
    rng, training = random.Random(2), Training(nursery, tmp_path, {"work": "folds"})
    for _ in range(20):
        training.start()
        time.sleep(rng.uniform(0.5, 4.0))
        training.kill()
        if training.wait() == 0:
            break
    assert training.run() == 0, training.printed()
    assert (training.home / "folds").read_text().splitlines() == five
    assert_folds_clean(training)


def assert_folds_clean(training: Training) -> None:
    """Each fold has its model, and no checkpoints any more."""
    assert os.listdir(training.temporary) == []
    for number in range(5):
        model = sorted(
            path.suffix for path in (training.out / f"fold_{number}" / "model").iterdir()
        )
        assert model == [".json", ".safetensors"]
        assert not list((training.out / f"fold_{number}" / "checkpoints").iterdir())
        assert not list((training.out / f"fold_{number}").glob("*.partial"))
        assert json.loads(json.dumps(fold_store(training, number, "model")))[0]["step"] == 6


# --- The command line ---------------------------------------------------------------------------


def command(home: Path, variables: dict[str, str], step: str, *options: str) -> subprocess.Popen:
    """Start ``percepiano STEP`` for a demo run in ``home``; it prints to ``printed``."""
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    call = [sys.executable, "-u", "-m", "percepiano_ast", step, "--preset", "demo"]
    with (home / "printed").open("w") as printed:
        return subprocess.Popen(
            [*call, "--out", str(home / "run"), *options],
            env=os.environ | variables | {"TMPDIR": str(home / "tmp")},
            cwd=Path(__file__).resolve().parent.parent,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )


def run_killed(rng: random.Random, kills: int, seconds: float, *call, after: str = "") -> int:
    """Start a command and kill it within ``seconds``, half of the time counted from a line that it
    prints; again and again, at most ``kills`` times, then run it to its end. Returns the kills."""
    home, killed = call[0], 0
    for _ in range(kills):
        process, line = command(*call), rng.choice(["", after])
        while process.poll() is None and line not in (home / "printed").read_text():
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, seconds))
        process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL), (home / "printed").read_text()
        killed += code != 0
    assert command(*call).wait() == 0, (home / "printed").read_text()
    return killed


def arrays_and_history(home: Path) -> dict:
    """What a finished pre-training left: the newest arrays, read by safetensors itself, and the
    history."""
    folder = home / "run" / "pretrain" / "ssast"
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    arrays = {name: array.tobytes() for name, array in load_file(newest).items()}
    history = without_seconds(rows(folder / "history.csv"))
    return {"file": newest.name[:13], "arrays": arrays, "history": history}


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 10], ids=["killed_twice", "often"])
def test_the_command_killed_at_random_ends_as_if_it_never_was(kills, tmp_path):
    rng, options = random.Random(3), ("--epochs", "4")
    with compiled_once(tmp_path / "compiled") as variables:
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        began = time.monotonic()
        assert command(whole, variables, "preprocess").wait() == 0
        seconds = time.monotonic() - began
        run_killed(rng, 1 + kills // 4, seconds, cut, variables, "preprocess")
        assert command(whole, variables, "pretrain", *options).wait() == 0
        trained = [float(row["seconds"]) for row in rows(whole / "run/pretrain/ssast/history.csv")]
        shutil.rmtree(cut / "tmp")  # of `preprocess`
        call = (cut, variables, "pretrain", *options)
        killed = run_killed(rng, kills, trained[-1], *call, after="compiled the training step")
    assert killed > 0 and len(trained) == 4
    assert arrays_and_history(cut) == arrays_and_history(whole)
    names = sorted(path.name for path in (cut / "run/pretrain/ssast/checkpoints").iterdir())
    # the last two and perhaps a better one
    assert len(names) in (4, 6) and {name.split(".", 2)[2] for name in names} == {
        "json",
        "p0.safetensors",
    }
    assert list((cut / "tmp").iterdir()) == [] and not list((cut / "run").rglob("*.partial"))


# --- Two runs in one directory -------------------------------------------------------------------


def beside(training: Training, home: Path, **request) -> Training:
    """Another training, by the command line, with the same ``--out``."""
    home.mkdir()
    (home / "out").symlink_to(training.out)
    return Training(training.nursery, home, {"work": "command", **request})


def refusal(training: Training) -> str:
    """The one line of error of a training."""
    assert "Traceback" not in training.printed()
    (line,) = [line for line in training.printed().splitlines() if line.startswith("error: ")]
    return line


def locks(training: Training) -> list[Path]:
    return list(training.out.glob("lock.*"))


QUICK = {"lock.HEARTBEAT": 0.2, "lock.STALE": 1.5, "lock.POLL": 0.1}
OTHER = "process 7 on elsewhere since 2026-11-30 08:15 UTC"


class TestLock:
    """A second run in a directory is refused while the first goes on; see `test_checkpoints`."""

    @pytest.mark.slow
    def test_the_second_is_refused_and_the_first_is_undisturbed(self, nursery, whole, tmp_path):
        first = Training(nursery, tmp_path / "first", {"work": "command", "gates": [STEPS + 5]})
        first.start()
        first.until_gate(STEPS + 5)
        second = beside(first, tmp_path / "second")
        assert second.run() == 2, second.printed()
        name = f"{second.out} is in use by process {first.pid} on {socket.gethostname()} since 2"
        assert re.search(f"{name}.* UTC. Wait until .* or choose another output", refusal(second))
        assert second.started_from() is None
        first.open_gate(STEPS + 5)
        assert first.wait() == 0, first.printed()
        assert outcome(first) == {name: whole[name] for name in whole if name != "steps.csv"}
        assert_clean(first)
        assert not locks(first)

    def test_of_two_that_start_at_once_one_goes_on(self, nursery, whole, tmp_path):
        first = Training(nursery, tmp_path / "first", {"work": "command"})
        second = beside(first, tmp_path / "second")
        first.start(pause=0.02)
        second.start(pause=0.02)
        codes = {first.wait(): first, second.wait(): second}
        assert codes.keys() == {0, 2}, first.printed() + second.printed()
        assert "is in use by process" in refusal(codes[2])
        assert outcome(first) == {name: whole[name] for name in whole if name != "steps.csv"}
        assert_clean(first)
        assert not locks(first)

    @pytest.mark.parametrize("own", ["deleted", pytest.param("left", marks=pytest.mark.slow)])
    def test_a_run_whose_place_was_taken_over_stops_and_leaves_everything(
        self, nursery, tmp_path, own
    ):
        """The machine slept, or Drive showed two that started at once late."""
        request = {"work": "command", "changes": QUICK, "gates": [STEPS + 5]}
        training = Training(nursery, tmp_path, request)
        training.start()
        training.until_gate(STEPS + 5)
        training.until(lambda: training.newest() == STEPS)
        if own == "deleted":
            locks(training)[0].unlink()
        other_lock(training.out)
        if own == "left":  # that run goes on too, and its name comes first
            for age in range(9):
                time.sleep(0.2)
                other_lock(training.out, age)
        before = {path: path.read_bytes() for path in training.out.rglob("*") if path.is_file()}
        training.open_gate(STEPS + 5)
        assert training.wait() == 1, training.printed()
        assert f"{training.out} was taken over by {OTHER}" in refusal(
            training
        ) and "this run stops" in refusal(training)
        after = {path: path.read_bytes() for path in training.out.rglob("*") if path.is_file()}
        own_lock = before.keys() - after.keys()
        assert {path.name.split(".")[0] for path in own_lock} <= {"lock"}
        changed = {path.name for path in after if after[path] != before.get(path)}
        assert not {name for name in changed if not name.startswith("events")}, changed

"""Places for checkpoints that fail for real: full, read-only, gone, broken or silent file systems,
and Google's store.

Cost: about 45 s on two free cores, most of it children that start; the slow ones take 6 min. Needs
root, for mounts.
"""

import contextlib
import errno
import os
import re
import time
from pathlib import Path

import pytest
from failing import EPOCHS, STEPS, Nursery, Training, other_lock
from failing_places import Front, Fuse, Small
from servers import StorageEmulator
from tiny import bits, without_seconds

from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.training import lock
from percepiano_ast.training.checkpoints import Storage, listing, open_latest
from percepiano_ast.training.lock import Lock

# Waits of seconds instead of minutes.
SHORT = {"TIMEOUT": 1.0, "FIRST_WAIT": 0.05, "FINAL_WAITS": [0.0, 0.2, 0.5]}
# A save waits until the one before has arrived or failed: what is said in which epoch does not
# depend on speed.
SHORT = {f"checkpoints.{name}": value for name, value in (SHORT | {"SOON": 10.0}).items()}
BROKEN, MENDED = STEPS + 5, 3 * STEPS + 5  # steps before which a place breaks, and is mended
LAST = EPOCHS * STEPS
NOT_THERE = "warning: the checkpoint is not in "


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory) -> tuple:
    """What a run ends with whose place never failed."""
    training = Training(nursery, tmp_path_factory.mktemp("whole"))
    training.open_gate(BROKEN)
    training.finish(gates=[BROKEN])  # with gates there is a checkpoint an epoch, and no others
    return outcome(training.store)


def outcome(store) -> tuple:
    tree, description = open_latest(store, made_by="")
    return description["step"], bits(tree), without_seconds(description["history"])


@pytest.fixture
def breakable(tmp_path):
    """``breakable(kind, folder)``: a folder that may break, whole at first and at the end."""
    try:
        probe = Fuse(tmp_path / "probe", errno.ENOTCONN)
        probe.begin()
        probe.end()
        Small(tmp_path / "probe", "full").unmount()
    except OSError as error:
        pytest.skip(f"places that fail need the right to mount: {error}")
    with contextlib.ExitStack() as stack:

        def make(kind: str, folder: Path):
            if kind in ("ENOSPC", "EROFS"):
                place = Small(folder, {"ENOSPC": "full", "EROFS": "read-only"}[kind])
                stack.callback(place.unmount)
            else:
                place = Fuse(
                    folder, {"EIO": errno.EIO, "ENOTCONN": errno.ENOTCONN, "hang": 0}[kind]
                )
            stack.callback(place.end)
            return place

        yield make


WORDS = {
    "EIO": "Input/output error",
    "ENOTCONN": "Transport endpoint is not connected",
    "ENOSPC": "No space left on device",
    "EROFS": "Read-only file system",
    "hang": "no response for 1 s",
}


def kinds(quick=tuple(WORDS)):
    return pytest.mark.parametrize(
        "kind",
        [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in WORDS],
    )


def train_until_broken(nursery: Nursery, home: Path, place, **request) -> Training:
    """A training by the command line whose first checkpoint arrived; it waits before a step, and
    its place is broken."""
    training = Training(
        nursery, home, {"work": "command", "gates": [BROKEN, MENDED], "changes": SHORT} | request
    )
    training.start()
    training.until_gate(BROKEN)
    # Its manifest is seen before the training knows that it is there; then the file on the local
    # disk goes.
    training.until(
        lambda: (
            training.newest() == STEPS
            and not any(files for *_, files in os.walk(training.temporary))
        )
    )
    place.begin()
    training.open_gate(BROKEN)
    return training


def go_on_to_the_end(training: Training, seconds: float = 60.0) -> tuple[int, str]:
    training.open_gate(MENDED)
    code = training.wait(seconds)
    return code, training.printed()


def assert_said(printed: str, words: str, place, epochs: tuple[int, ...]) -> None:
    """At once, and when each of these epochs was saved."""
    assert re.search(
        rf"{NOT_THERE}{place} yet: .*({words}).* Older ones are not deleted; training continues",
        printed,
    )
    # Two threads print, perhaps into one line. A save comes before its epoch's line: its warning
    # stands between two of them.
    at = {int(found[1]): found.start() for found in re.finditer(r"  epoch (\d)/", printed)}
    for number in epochs:
        between = printed[at[number - 1] : at[number]]
        assert re.search(rf"checkpoints cannot be saved in {place} \(.*({words})", between), printed


class TestFolder:
    """``--store`` is a folder, as of a mounted Drive."""

    @kinds(quick=("EIO", "ENOSPC"))
    def test_training_goes_on_and_saves_when_the_place_is_back(
        self, kind, breakable, nursery, whole, tmp_path
    ):
        place = breakable(kind, tmp_path / "place")
        training = train_until_broken(
            nursery, tmp_path / "run", place, store=str(tmp_path / "place")
        )
        training.until_gate(MENDED)
        # of steps 20 and 30
        training.until(lambda: len(re.findall(NOT_THERE, training.printed())) >= 2)
        place.end()
        assert (
            training.newest() == STEPS
            and open_latest(training.store, made_by="")[1]["step"] == STEPS
        )
        code, printed = go_on_to_the_end(training)
        assert code == 0, printed
        assert_said(printed, WORDS[kind], training.store, (3,))
        assert "Traceback" not in printed
        assert (
            f"{training.store} is writable again: the checkpoint of step {LAST} is saved" in printed
        )
        assert outcome(training.store) == whole
        assert len(list(training.store.iterdir())) <= 6 and os.listdir(training.temporary) == []

    @kinds(quick=())
    def test_a_place_that_stays_broken_ends_the_run_with_an_error(
        self, kind, breakable, nursery, whole, tmp_path
    ):
        place = breakable(kind, tmp_path / "place")
        training = train_until_broken(
            nursery, tmp_path / "run", place, store=str(tmp_path / "place")
        )
        training.until_gate(MENDED)
        code, printed = go_on_to_the_end(training)
        assert code == 1, printed
        assert_said(printed, WORDS[kind], training.store, (3, 4))
        assert "Traceback" not in printed
        error = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and printed.splitlines()[-1] == error[0], printed
        assert re.search(
            rf"checkpoint of step {LAST} was not saved in {training.store} \(.*{WORDS[kind]}",
            error[0],
        )
        assert (
            f"the last saved checkpoint is of step {STEPS}. Fix the storage location and run again"
            in error[0]
        )
        # It tried again at the end, more than once.
        last = printed[printed.index(f"epoch {EPOCHS}/{EPOCHS}") :]
        assert last.count(NOT_THERE) >= 2, printed
        place.end()
        assert training.newest() == STEPS
        training.finish()
        assert training.started_from() == STEPS and outcome(training.store) == whole

    @pytest.mark.parametrize("kind", ["EIO", "ENOTCONN", "hang"])
    @pytest.mark.parametrize("above", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_a_run_does_not_start_over_where_its_place_is_broken(
        self, kind, above, breakable, nursery, tmp_path
    ):
        request = {"work": "command", "store": str(tmp_path / "place"), "changes": SHORT}
        training = Training(nursery, tmp_path / "run", request)
        place = breakable(kind, tmp_path / "place" if above else training.store)
        training.store.mkdir(parents=True)
        place.begin()
        assert training.run() == 1, training.printed()
        (line,) = [line for line in training.printed().splitlines() if line.startswith("error: ")]
        assert (
            str(tmp_path / "place") in line
            and WORDS[kind] in line
            and "Traceback" not in training.printed()
        )
        assert training.started_from() is None

    @pytest.mark.slow
    def test_a_place_that_is_read_only_from_the_start_is_said_before_training(
        self, breakable, nursery, tmp_path
    ):
        breakable("EROFS", tmp_path / "place").begin()
        request = {"work": "command", "store": str(tmp_path / "place"), "changes": SHORT}
        training = Training(nursery, tmp_path / "run", request)
        assert training.run() in (1, 2) and WORDS["EROFS"] in training.printed()
        assert training.started_from() is None


class TestLocalDisk:
    """The disk where checkpoints are written first."""

    @pytest.mark.parametrize("mended", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_full(self, mended, breakable, nursery, whole, tmp_path):
        place = breakable("ENOSPC", tmp_path / "run" / "tmp")
        training = train_until_broken(nursery, tmp_path / "run", place)
        training.until_gate(MENDED)
        assert training.newest() == STEPS
        if mended:
            place.end()
        code, printed = go_on_to_the_end(training)
        assert code == (0 if mended else 1), printed
        assert_said(
            printed, "No space left on device|not enough space|ENOSPC", training.store, (3,)
        )
        place.end()
        training.finish()
        assert training.started_from() == (None if mended else STEPS)
        assert outcome(training.store) == whole and os.listdir(training.temporary) == []


# history.csv and steps.csv lie beside the checkpoints.
@pytest.mark.slow
@kinds(quick=tuple(WORDS))
def test_a_run_without_store_whose_directory_fails_goes_on(
    kind, breakable, nursery, whole, tmp_path
):
    place = breakable(kind, tmp_path / "run" / "out")
    training = train_until_broken(nursery, tmp_path / "run", place)
    try:
        training.until(lambda: f"gate {MENDED}" in training.events(), seconds=20)
    finally:
        training.kill()
    training.wait()


# --- Google's store -----------------------------------------------------------------------------


@pytest.fixture
def front():
    pytest.importorskip("gcsfs", reason="gcsfs is optional: Colab's TPU runtime has none")
    with StorageEmulator() as emulator, Front(emulator) as front:
        yield front


class TestBucket:
    """``gs://``, through an emulator of Google's store."""

    def test_one_run_at_a_time(self, front, tmp_path, monkeypatch, logged):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", front.url)
        for name, seconds in (("HEARTBEAT", 0.2), ("STALE", 2.0), ("POLL", 0.1)):
            monkeypatch.setattr(lock, name, seconds)
        storage, content = Storage("gs://bucket/run"), other_lock(tmp_path).read_bytes()
        storage.write("lock.0000000000000000.json", content)
        with Lock("gs://bucket/run") as one:  # of a machine that is gone
            assert storage.names() == [one._name] and "taking over" in logged[-1]
            first, deadline = storage.read(one._name), time.monotonic() + 20
            while storage.read(one._name) == first:  # it shows signs of life
                assert time.monotonic() < deadline
            monkeypatch.setattr(lock, "_machine", lambda: "another machine")
            with pytest.raises(
                InputError, match=f"gs://bucket/run is in use by process {os.getpid()}"
            ):
                Lock("gs://bucket/run").__enter__()
            storage.remove(one._name)
            storage.write("lock.0000000000000000.json", content)
            with pytest.raises(RunFailed, match="gs://bucket/run was taken over by process 7 on"):
                one.check()
        assert storage.names() == ["lock.0000000000000000.json"]

    def of(self, front: Front, **request) -> dict:
        return {
            "store": "gs://bucket/run",
            "environment": {"STORAGE_EMULATOR_HOST": front.url},
            **request,
        }

    def test_killed_and_resumed_it_is_the_run_in_a_folder(
        self, front, nursery, whole, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", front.url)
        training = Training(nursery, tmp_path, {"gates": [BROKEN, MENDED]} | self.of(front))
        place = "gs://bucket/run/checkpoints"
        training.start()
        training.open_gate(BROKEN)
        training.until_gate(MENDED)
        training.until(lambda: listing(place)[-1]["step"] == 3 * STEPS)
        training.kill()
        assert training.wait() < 0
        training.open_gate(MENDED)
        training.finish()
        assert training.started_from() == 3 * STEPS and outcome(place) == whole
        assert os.listdir(training.temporary) == []

    # gcsfs logs every failure with its traceback, which Python prints where nobody has set up
    # logging.
    @pytest.mark.slow
    def test_what_is_said_of_a_failing_service_can_be_read(self, front, nursery, tmp_path):
        front.begin("503")
        request = {"work": "command", "changes": SHORT | {"checkpoints.TIMEOUT": 60.0}}
        training = Training(nursery, tmp_path, request | self.of(front, hasty=True))
        assert training.run() == 1 and training.printed().count("error: ") == 1
        assert "Traceback" not in training.printed()

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["503", "500", "refuses", "hangs"])
    @pytest.mark.parametrize("mended", [True, False])
    def test_a_service_that_fails(self, mode, mended, front, nursery, whole, tmp_path, monkeypatch):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", front.url)
        place = "gs://bucket/run/checkpoints"
        patience = {"checkpoints.TIMEOUT": 1.0 if mode == "hangs" else 60.0}
        request = {"work": "command", "gates": [BROKEN, MENDED], "changes": SHORT | patience}
        training = Training(nursery, tmp_path, request | self.of(front, hasty=True))
        training.start()
        training.until_gate(BROKEN)
        training.until(lambda: listing(place))
        front.begin(mode)
        training.open_gate(BROKEN)
        training.until_gate(MENDED)
        training.until(lambda: len(re.findall(NOT_THERE, training.printed())) >= 2)
        if mended:
            front.end()
        code, printed = go_on_to_the_end(training)
        assert code == (0 if mended else 1), printed
        words = {
            "503": "503",
            "500": "500",
            "refuses": "Cannot connect",
            "hangs": "no response for 1 s",
        }[mode]
        assert_said(printed, words, place, (3,) if mended else (3, 4))
        if not mended:
            assert printed.splitlines()[-1].startswith(
                f"error: the checkpoint of step {LAST} was not saved in {place} ("
            )
        front.end()
        assert [one["step"] for one in listing(place)] == ([STEPS, LAST] if mended else [STEPS])
        training.finish()
        assert outcome(place) == whole

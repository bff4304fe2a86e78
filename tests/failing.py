"""Trainings in child processes that are killed, watched and made to end badly: what the tests of
kills and failures share.

A nursery has imported everything once, and forks a child for each training before JAX has any
device: a start costs two seconds instead of six. A child is an ordinary process otherwise, and ends
as one does.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
EPOCHS, STEPS = 4, 10
LOOK_EVERY = 2  # steps between looks, and so between checkpoints: there are many


# --- In the tests' own process ------------------------------------------------------------------


class Nursery:
    """Starts trainings; all that it started end with it."""

    def __init__(self, variables: dict[str, str]):
        command = [sys.executable, str(HERE / "failing.py")]
        environment = (
            os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
        )
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


@dataclass
class Training:
    """A training that is started again and again in one directory.

    Attributes:
        home: holds the run ``out``, its local temporary files ``tmp``, and what was printed and
            noted.
        request: what every start is asked for; see `_work`.
    """

    nursery: Nursery
    home: Path
    request: dict = field(default_factory=dict)
    pid: int = 0

    def __post_init__(self):
        self.request = {"work": "pretrain", "home": str(self.home), "store": "", **self.request}
        self.out, self.temporary = self.home / "out", self.home / "tmp"
        for folder in (self.out, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def store(self) -> Path:
        return Path(self.request["store"] or self.out) / "checkpoints"

    def start(self, **changes) -> None:
        for name in ("events", "printed"):
            (self.home / name).write_text("")
        self.pid = self.nursery.ask(do="start", **self.request | changes)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code, minus the signal's number where one ended it; AssertionError where it does
        not end."""
        code = self.nursery.ask(do="wait", pid=self.pid, seconds=seconds)
        assert code is not None, f"no end after {seconds} s:\n{self.printed()}"
        return code

    def run(self, seconds: float = 60.0, **changes) -> int:
        self.start(**changes)
        return self.wait(seconds)

    def finish(self, **changes) -> None:
        """Run to the end, which must be a good one."""
        code = self.run(**changes)
        assert code == 0, f"exit code {code}:\n{self.printed()}"

    def printed(self) -> str:
        """All that the latest start printed."""
        return (self.home / "printed").read_text(errors="replace")

    def events(self) -> list[str]:
        """What the latest start noted: ``from 20``, ``gate 25``."""
        return (self.home / "events").read_text().splitlines()

    def started_from(self) -> int | None:
        """The step that the latest start went on from; None where it did not come so far."""
        return next(
            (int(event.split()[-1]) for event in self.events() if event.startswith("from")), None
        )

    def newest(self) -> int:
        """Step of the newest checkpoint in the store that has a manifest; 0 where there is none."""
        return max(
            (int(path.name[5:13]) for path in self.store.glob("step_????????.????????.json")),
            default=0,
        )

    def until(self, condition, seconds: float = 60.0) -> None:
        """Wait for a condition; fails where it does not come, or the training ends before."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited for {seconds} s:\n{self.printed()}"
            gone = self.nursery.ask(do="poll", pid=self.pid)
            assert gone is None or condition(), f"it ended with {gone}:\n{self.printed()}"
            time.sleep(0.01)

    def until_gate(self, step: int) -> None:
        """Until it waits before the batch of this step."""
        self.until(lambda: f"gate {step}" in self.events())

    def open_gate(self, step: int) -> None:
        (self.home / f"gate {step}").touch()


def other_lock(folder: Path, age: float = 0.0, name: str = "0" * 16, **facts) -> Path:
    """The lock of a run on another machine, whose last sign of life is so many seconds ago."""
    beat = (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="seconds")
    known = {"host": "elsewhere", "process": 7, "started": "1", "machine": "elsewhere 1"}
    known |= {"since": "2026-11-30T08:15:00+00:00", "beat": beat, **facts}
    path = folder / f"lock.{name}.json"
    path.with_suffix(".new").write_text(json.dumps(known))
    path.with_suffix(".new").replace(path)
    return path


# --- In the nursery -----------------------------------------------------------------------------


class _Forked(BaseException):
    """Carries a request out of the nursery's loop, in the child."""


def _serve() -> None:
    ended = {}

    def end_of(pid: int, seconds: float = 0.0) -> int | None:
        end = time.monotonic() + seconds
        while pid not in ended:
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                ended[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return None
            else:
                time.sleep(0.002)
        return ended[pid]

    started = []
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("do") == "start":
            pid = os.fork()
            if not pid:
                raise _Forked(request)
            started.append(pid)
            answer = pid
        else:
            answer = end_of(**request)
            if answer is None and request.get("seconds"):
                os.kill(request["pid"], signal.SIGKILL)
                end_of(request["pid"], 10.0)
        print(json.dumps(answer), flush=True)
    for pid in started:
        if end_of(pid) is None:
            os.kill(pid, signal.SIGKILL)


# --- In a child ---------------------------------------------------------------------------------


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal is on its way


def _work(
    *,
    work: str,
    home: str,
    store: str,
    aim=None,
    gates=(),
    changes=None,
    environment=None,
    pause=0.0,
    hasty=False,
) -> None:
    """One training.

    Args:
        aim: the point at which it kills itself, see `_AIMS`, and how often it passes it before. It
            saves at every look.
        gates: it waits before the batches of these steps until the test opens them.
        changes: values of the modules' constants, ``{"checkpoints.TIMEOUT": 1}``.
        pause: seconds before every batch.
        hasty: gcsfs asks Google's store its six times within a second, not half a minute.
    """
    if hasty:
        gcsfs.retry.asyncio = types.SimpleNamespace(
            sleep=lambda seconds: asyncio.sleep(seconds / 50)
        )
    _redirect(Path(home), environment or {})
    for name, value in {"loop.LOG_EVERY": LOOK_EVERY, **(changes or {})}.items():
        module, _, constant = name.rpartition(".")
        module = sys.modules[f"percepiano_ast.training.{module}"]
        getattr(module, constant)  # it must be there
        setattr(module, constant, value)
    if aim:
        _save_at_every_look()
        _AIMS[aim[0]](*aim[1:])
    {"pretrain": _pretrain, "folds": _folds, "command": _command}[work](
        Path(home), store, gates, pause
    )


def _redirect(home: Path, environment: dict[str, str]) -> None:
    os.environ.update({"TMPDIR": str(home / "tmp")} | environment)
    tempfile.tempdir = None
    printed = os.open(home / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for there, here in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(there, here)
    sys.stdout.reconfigure(line_buffering=True)


def _note(home: Path, event: str) -> None:
    with (home / "events").open("a") as file:
        file.write(f"{event}\n")


def _pretrain(home: Path, store: str, gates, pause: float) -> None:
    def batches(start: int):
        _note(home, f"from {start}")
        for step, batch in enumerate(tiny.stream(start), start):
            time.sleep(pause)
            if step == start + 1:  # the first step is compiled
                _note(home, f"trains {step}")
            if step in gates:
                _note(home, f"gate {step}")
                while not (home / f"gate {step}").exists():
                    time.sleep(0.005)
            yield batch

    pretrain.pretrain(
        tiny.MODEL,
        dataclasses.replace(tiny.PRETRAIN, epochs=EPOCHS),
        tiny.FRONT_END,
        tiny.STATISTICS,
        batches=batches,
        steps_per_epoch=STEPS,
        validation=tiny.validation_batches,
        directory=home / "out",
        description={"data": "made here"},
        store=store,
        save_minutes=1000.0 if gates else 0.0,
    )


def _command(home: Path, store: str, gates, pause: float) -> None:
    """The same by the command line, whose shards are those of `_pretrain`."""
    from percepiano_ast import __main__, pipeline

    pipeline.pretrain = lambda run, **options: _pretrain(home, run.store, gates, pause)
    sys.exit(__main__.main(["pretrain", "--out", str(home / "out"), "--store", store]))


def _folds(home: Path, store: str, gates, pause: float) -> None:
    """Five folds, one after the other; their parameters go to ``folds`` as checksums."""
    run = tiny.finetuning(strategy="full")
    params = run.init(0)
    embeddings = tiny.embed(run, params, tiny.CLIPS)
    sums = []
    for number in range(5):

        def windows(start: int, number=number):
            _note(home, f"fold {number} from {start}")
            return tiny.windows_from(start)

        outside = [clip for clip in range(len(tiny.CLIPS)) if clip % 5 != number]
        result = finetune.finetune_fold(
            run,
            params,
            embeddings,
            ratings=tiny.RATINGS,
            train=np.array(outside),
            windows=windows,
            steps_per_epoch=2,
            directory=home / "out" / f"fold_{number}",
            settings={"data": "made here", "fold": number},
            save_minutes=0.0,
        )
        sums.append(hashlib.sha256(b"".join(tiny.bits(result))).hexdigest())
    (home / "folds").write_text("\n".join(sums))


def _save_at_every_look() -> None:
    """So that the number of saves does not depend on speed: wait where a training would go on
    without one."""
    busy = checkpoints.Checkpoints.busy.fget

    def patient(self) -> bool:
        while busy(self):
            time.sleep(0.002)
        return False

    checkpoints.Checkpoints.busy = property(patient)


def _countdown(skip: int):
    """True once, after so many times False."""
    left = iter(range(skip, -1, -1))
    return lambda: next(left, -1) == 0


def _kill_around(
    owner, name: str, skip: int, when=lambda *arguments: True, after: bool = False
) -> None:
    """Die when a function is called for the (skip + 1)th time, or after it has done its work."""
    original, now = getattr(owner, name), _countdown(skip)

    def dying(*arguments, **named):
        dies = when(*arguments) and now()
        if dies and not after:
            be_killed()
        result = original(*arguments, **named)
        if dies:
            be_killed()
        return result

    setattr(owner, name, dying)


def _aim_write(kind: str, skip: int, blocks: int = 1) -> None:
    """After so many blocks of a file to the store have been written; blocks are small, so that
    there are some."""
    checkpoints.BLOCK = 2**13
    original, now = checkpoints.Storage._write, _countdown(skip)

    def cut(content):
        for number, block in enumerate(content):
            if kind == ".json":  # it is one block
                yield block[: len(block) // 2]
            if number == blocks or kind == ".json":
                time.sleep(0.05)
                be_killed()
            yield block

    def write(self, name, content):
        dies = _is(name, kind) and now()
        # what stands in a buffer would be lost with the process: write through
        if dies and kind == ".json":
            open_ = Path.open
            Path.open = lambda path, mode="r", *rest, **named: open_(
                path, mode, 0 if mode == "wb" else -1, **named
            )
        original(self, name, cut(content) if dies else content)

    checkpoints.Storage._write = write


def _aim_local(skip: int) -> None:
    """While the local file is written: as soon as there is a part of it in the temporary
    directory."""
    original, now = checkpoints.save_file, _countdown(skip)

    def watch():
        while not any(
            path.is_file() for path in Path(tempfile.gettempdir()).glob("percepiano_ast-*/*")
        ):
            time.sleep(0.0001)
        be_killed()

    def save_file(*arguments):
        if now():
            threading.Thread(target=watch, daemon=True).start()
            time.sleep(0.01)
        return original(*arguments)

    checkpoints.save_file = save_file


def _named(kind: str):
    return lambda storage, name, *rest: _is(name, kind)


def _is(name: str, kind: str) -> bool:
    """Whether a file holds arrays, or is a manifest and not the probe of a place."""
    return bool(checkpoints.complete([name])) if kind == ".json" else name.endswith(kind)


_AIMS = {
    "while the local file is written": _aim_local,
    "after the local file is written": lambda skip: _kill_around(
        checkpoints, "save_file", skip, after=True
    ),
    "while it is copied": lambda skip: _aim_write(".safetensors", skip, 2),
    "while it is read back": lambda skip: _kill_around(
        checkpoints.Storage, "_write", skip, _named(".safetensors"), after=True
    ),
    "before the manifest": lambda skip: _kill_around(
        checkpoints.Storage, "_write", skip, _named(".json")
    ),
    "while the manifest is written": lambda skip: _aim_write(".json", skip),
    "after the manifest": lambda skip: _kill_around(
        checkpoints.Storage, "_write", skip, _named(".json"), after=True
    ),
    "between deletions": lambda skip: _kill_around(
        checkpoints.Storage, "_remove", skip, _named(".json"), after=True
    ),
    "between emptying and deletion": lambda skip: _kill_around(os, "truncate", skip, after=True),
    "while loading fetches": lambda skip: _kill_around(checkpoints.Storage, "get", skip),
    "after loading fetches": lambda skip: _kill_around(
        checkpoints.Storage, "get", skip, after=True
    ),
    "while loading reads": lambda skip: _kill_around(checkpoints, "read_arrays", skip, after=True),
    "while incomplete files are removed": lambda skip: _kill_around(
        checkpoints.Storage, "_remove", skip, after=True
    ),
    "when the model is there": lambda skip: _kill_around(checkpoints.Checkpoints, "clear", skip),
}


if __name__ == "__main__":
    # Imported by the nursery, so that no child has to.
    import asyncio
    import dataclasses
    import hashlib
    import threading
    import types

    import numpy as np
    import tiny

    from percepiano_ast.training import checkpoints, finetune, pretrain

    with contextlib.suppress(ImportError):
        import gcsfs.retry
    try:
        _serve()
    except _Forked as forked:
        _request = forked.args[0]
    else:
        sys.exit()
    _work(**_request)

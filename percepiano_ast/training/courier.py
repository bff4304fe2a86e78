"""Background saving to a storage location that may fail or hang; the caller does not wait for
it."""

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

# seconds that a caller waits for the previous upload; after that, only until it is packed
SOON = 1.0
LAST_WAITS = (0.0, 2.0, 10.0)  # seconds before each final attempt


class Delivery(Protocol):
    """One item to save."""

    @property
    def packed(self) -> bool:
        """Whether `pack` has finished and freed the caller's memory."""

    def pack(self) -> None:
        """Write the item to the local disk; raises OSError if that fails for now."""

    def deliver(self) -> None:
        """Upload the item; raises OSError if that fails for now."""

    def discard(self) -> None:
        """Delete the item's files on the local disk."""


Sent = TypeVar("Sent", bound=Delivery)


class Courier(Generic[Sent]):
    """Packs one item at a time and uploads one at a time; of the items that wait for upload only
    the newest is saved.

    Attributes:
        trouble: error of the last attempt, or None.
        waiting: the newest item that has not been uploaded.
    """

    def __init__(self, complain: Callable[[OSError], None]):
        self.trouble: OSError | None = None
        self.waiting: Sent | None = None
        self._complain = complain
        self._changed = threading.Condition()
        self._packing: Sent | None = None
        self._in_hand: Sent | None = None  # being uploaded
        self._taken = 0.0  # start of the upload
        self._fault: BaseException | None = None  # an error other than those of disk and store

    @property
    def busy(self) -> bool:
        """Whether an item is being packed or uploaded."""
        return bool(self._packing or self._in_hand)

    @property
    def seconds_in_hand(self) -> float:
        """Seconds since the current upload began; 0 without one."""
        return time.monotonic() - self._taken if self._in_hand else 0.0

    def wait_for_turn(self, soon: float | None = None) -> None:
        """Wait until the next item may be sent: the previous one is packed, and uploaded unless
        that takes long (``SOON``)."""
        with self._changed:
            self._changed.wait_for(lambda: not self._packing)
            if self.trouble is None:
                self._changed.wait_for(
                    lambda: not self._in_hand, timeout=SOON if soon is None else soon
                )
            if self.waiting and not self.waiting.packed:
                self.waiting = None  # superseded; frees its memory
        self._raise_fault()

    def send(self, parcel: Sent) -> None:
        """Pack and upload in the background. Call `wait_for_turn` first."""
        with self._changed:
            self._packing = parcel
        # Daemon threads: a store that hangs does not block the exit of the process.
        threading.Thread(target=self._bring, args=(parcel,), name="checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Wait until nothing is being packed or uploaded: everything is saved, or has failed for
        now."""
        with self._changed:
            self._changed.wait_for(lambda: not self.busy)
        self._raise_fault()

    def insist(self) -> bool:
        """Wait, and try again after errors; returns whether everything is saved."""
        for seconds in LAST_WAITS:
            self.wait()
            if self.waiting is None:
                return True
            time.sleep(seconds)
            self._packing = self.waiting
            self._bring(self.waiting)
        self._raise_fault()
        return self.waiting is None

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _bring(self, parcel: Sent) -> None:
        if not parcel.packed:
            self._attempt(parcel.pack)
        with self._changed:
            before, self.waiting, self._packing = self.waiting, parcel, None
            overtaken = before if before not in (None, parcel, self._in_hand) else None
            mine = self._in_hand is None
            if mine:
                self._in_hand, self._taken = parcel, time.monotonic()
            self._changed.notify_all()
        if overtaken:
            overtaken.discard()
        if mine:
            self._deliver_newest()

    def _deliver_newest(self) -> None:
        """Upload the current item, then the newest one packed meanwhile."""
        parcel = self._in_hand
        while parcel:
            arrived = parcel.packed and self._attempt(parcel.deliver)
            with self._changed:
                newest = self.waiting is parcel
                if arrived and newest:
                    self.waiting = None
                # Choose the next item under the lock: after it another thread may start an upload.
                done, parcel = parcel, None if newest or self._fault else self.waiting
                self._in_hand, self._taken = parcel, time.monotonic()
                self._changed.notify_all()
            if arrived or not newest:
                done.discard()

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except OSError as error:
            self.trouble = error
            self._complain(error)
            return False
        except BaseException as error:  # raised again in the caller
            self._fault = error
            return False
        return True

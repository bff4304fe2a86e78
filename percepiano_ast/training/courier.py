"""Brings parcels to a place that may fail or hang, while whoever sends them goes on."""

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

SOON = 1.0  # seconds that a sender waits for the parcel before to arrive; afterwards only until it is packed
LAST_WAITS = (0.0, 2.0, 10.0)  # seconds before each last attempt, when there is nothing else to do


class Parcel(Protocol):
    """What is sent."""

    @property
    def packed(self) -> bool:
        """Whether `pack` has made it ready, which frees the sender's memory."""

    def pack(self) -> None:
        """Make it ready on the local disk; an OSError says that it cannot be now."""

    def deliver(self) -> None:
        """Bring it there; an OSError says that it cannot be now."""

    def discard(self) -> None:
        """Delete what is left of it on the local disk."""


Sent = TypeVar("Sent", bound=Parcel)


class Courier(Generic[Sent]):
    """One parcel is packed at a time, and one is delivered; of those that wait for delivery only the newest is kept.

    Attributes:
        trouble: what the last attempt failed with; None while all is well.
        waiting: the newest parcel that has not arrived.
    """

    def __init__(self, complain: Callable[[OSError], None]):
        self.trouble: OSError | None = None
        self.waiting: Sent | None = None
        self._complain = complain
        self._changed = threading.Condition()
        self._packing: Sent | None = None
        self._in_hand: Sent | None = None  # being delivered
        self._taken = 0.0  # when that began
        self._fault: BaseException | None = None  # an error that is no disk's and no store's

    @property
    def busy(self) -> bool:
        """Whether something is packed or delivered at this moment."""
        return bool(self._packing or self._in_hand)

    @property
    def seconds_in_hand(self) -> float:
        """Since when something is being delivered; 0 when nothing is."""
        return time.monotonic() - self._taken if self._in_hand else 0.0

    def wait_for_turn(self, soon: float | None = None) -> None:
        """Wait until another parcel may be sent: the one before is packed, and has arrived or takes long (``SOON``)."""
        with self._changed:
            self._changed.wait_for(lambda: not self._packing)
            if self.trouble is None:
                self._changed.wait_for(lambda: not self._in_hand, timeout=SOON if soon is None else soon)
            if self.waiting and not self.waiting.packed:
                self.waiting = None  # overtaken: its memory is needed
        self._raise_fault()

    def send(self, parcel: Sent) -> None:
        """Pack and deliver; returns at once. Call `wait_for_turn` first."""
        with self._changed:
            self._packing = parcel
        # Daemons: a store that hangs for ever does not keep the process.
        threading.Thread(target=self._bring, args=(parcel,), name="checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Until nothing is on its way: all has arrived, or failed for now."""
        with self._changed:
            self._changed.wait_for(lambda: not self.busy)
        self._raise_fault()

    def insist(self) -> bool:
        """Wait, and try again what failed; whether everything has arrived."""
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
        """Deliver what is in hand, then what has been packed meanwhile."""
        parcel = self._in_hand
        while parcel:
            arrived = parcel.packed and self._attempt(parcel.deliver)
            with self._changed:
                newest = self.waiting is parcel
                if arrived and newest:
                    self.waiting = None
                # From here on another thread may take one in hand: what this one goes on with is settled here.
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
        except BaseException as error:  # the sender gets it
            self._fault = error
            return False
        return True

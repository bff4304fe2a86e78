"""Terminate worker processes together with their parent process."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def die_with_parent() -> None:
    """Process pool initializer: terminate this worker if its parent is killed, so that it cannot
    interfere with the next run."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # every worker has one
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

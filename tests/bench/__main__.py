"""``python tests/bench NAME``, in a clone with or without an installation."""

import sys
from pathlib import Path

if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(tests), str(tests.parent)]
    from bench import main

    sys.exit(main())

"""``python -m percepiano_ast``, see `cli`."""

import sys

from percepiano_ast.cli import main

if __name__ == "__main__":
    sys.exit(main())

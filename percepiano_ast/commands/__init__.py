"""The commands of ``percepiano``. Each module adds its own to the parser and imports what a command
needs when it is called, so that ``--help`` is quick."""

"""The one exception that users meet: a message of one line that names what to change."""


class AfaError(ValueError):
    """A mistake in what the user gave: a file, a key, a value.

    The message is one line and names the file or key, the value found and what to do. The command line
    prints it without a traceback and exits with status 2. Broken invariants of our own are `assert`s.
    """

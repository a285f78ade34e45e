"""What can go wrong, as a user is told it.

Each message is one line that says what is wrong, which value it was, and what would be right. The command line prints
it after `error:` and exits with 2; a library user catches `KleinError`. Anything else that escapes is a bug.
"""


class KleinError(Exception):
    """The parent of every error that a user can cause or mend."""


class RequestError(KleinError):
    """What was asked cannot be done: a size, a number of steps, a prompt, a picture, an output path."""


class CheckpointError(KleinError):
    """A model's files are missing, damaged, or not what they say they are."""

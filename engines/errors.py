"""Defines the errors, whose messages are one sentence for the user."""


class AnyDoorError(Exception):
    """A refusal in plain words: what was wrong, what was expected, where.

    The command line prints the text and exits with code 2; the server turns it into a status code.
    """


class BundleError(AnyDoorError):
    """The bundle is missing, damaged, of another format version, or does not fit this machine."""


class BackendError(AnyDoorError):
    """An execution backend is not installed, or cannot run here."""

"""The exception whose message is meant for the user."""


class InputError(ValueError):
    """Something that the user provided cannot be used.

    The message is one line. It names the flag, file or value and says what to do.
    """

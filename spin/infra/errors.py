"""The exception whose message is meant for the user."""


class InputError(ValueError):
    """Something that the user provided cannot be used.

    The message is one line. It names the flag, file or value and says what to do.
    """


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's message, on one line; its type if it has none."""
    message = str(error) or type(error).__name__
    return message.split(". ")[0].splitlines()[0]

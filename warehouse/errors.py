"""The one exception whose message is meant for the person at the keyboard."""


class HeadraceError(Exception):
    """What a user did or can mend: what is wrong, where, and what would be right.

    The command line prints the message alone (no traceback) and exits with 2; the server answers 4xx or 503 with it.
    """

"""The one exception for bad input: everything a user can mend by changing a file or a flag."""


class InputError(Exception):
    """Bad input, said in one line: which file or flag, what was found, what is allowed.

    Entry points print the message after ``error: `` and exit with code 2; nothing else of the project
    ends a run on purpose.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))

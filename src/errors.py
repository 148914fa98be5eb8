"""The one exception for bad input: everything a user can mend by changing a file or a flag."""

MOST = 2000  # characters of a message; a label of a megabyte is not repeated whole


class InputError(Exception):
    """Bad input, said in one line: which file or flag, what was found, what is allowed.

    Entry points print the message after ``error: `` and exit with code 2; nothing else of the project
    ends a run on purpose. What a file brings into the message cannot act on a terminal: characters without a shape of
    their own (control codes, changes of direction, halves of surrogate pairs) are written as escapes.
    """

    def __init__(self, message: str):
        line = " ".join(str(message).split())
        line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        super().__init__(line if len(line) <= MOST else f"{line[: MOST // 2]} ... {line[-MOST // 2 :]}")

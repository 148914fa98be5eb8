"""The command lines of the benchmarks: errors are raised, so that they end a program in one line."""

import argparse

from errors import InputError


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number from 1")
    return int(text)

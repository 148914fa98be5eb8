"""Continual-learning methods, one file each; `--method NAME` finds the file of that name here.

`make_method` is for code without a command line, such as `examples/`.
"""

import dataclasses
import importlib
import pkgutil

from errors import InputError
from methods.base import Method


def method_names() -> list[str]:
    """Names that `--method` takes: the files of this folder, except this one and `base*.py`."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("base"))


def find_method(name: str) -> type[Method]:
    """The `Method` subclass that `methods/<name>.py` defines.

    Raises:
        InputError: there is no such file, or no method in it, or several (an import error inside one is raised as it
            is).
    """
    if name not in method_names():
        raise InputError(f"--method: found {name}; allowed: {', '.join(method_names())}")
    module = importlib.import_module(f"methods.{name}")
    found = [
        member
        for member in vars(module).values()
        if isinstance(member, type) and issubclass(member, Method) and member.__module__ == module.__name__
    ]
    if len(found) != 1:
        classes = ", ".join(member.__name__ for member in found) or "none"
        raise InputError(f"--method {name}: src/methods/{name}.py defines {classes}; exactly one subclass of Method")
    return found[0]


def make_method(name: str, **options) -> Method:
    """The method of that name; its options have the names of the flags.

    An option that only other methods read is ignored, and `Method.summary` says so. The same settings can thus be
    passed to every method. Of what `preset` fixes, Hugging Face's options (optimizer, precision, ...) are left to the
    caller.

    Raises:
        InputError: an unknown method or preset, or a value that is not allowed, by itself or with the preset.
        TypeError: an option that no method has.
    """
    method = find_method(name)
    own = {option.name for option in dataclasses.fields(method.Arguments)}
    for option, value in method.fixed_by(options.get("preset")).items():
        if option in own and options.setdefault(option, value) != value:
            raise InputError(f"--{option}: found {options[option]}; allowed: {value} with "
                             f"--preset {options['preset']}")
    others = {option.name for other in method_names() for option in dataclasses.fields(find_method(other).Arguments)}
    ignored = [option for option in options if option in others - own]
    arguments = method.Arguments(method=name, **{key: options[key] for key in options if key not in ignored})
    arguments.ignored = ignored
    return method(arguments)

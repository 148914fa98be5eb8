"""Print this interpreter's path if its environment has exactly the packages of requirements files; else exit with 1.

    python scripts/satisfied.py requirements.txt [FILE ...]

Every line of a file is `name==version`, empty, or a comment. A local version (`2.13.0+cpu`) counts as its public one.
The installer writes INSTALLER last, so a package whose installation was interrupted does not count.
"""

import sys
from importlib.metadata import PackageNotFoundError, distribution


def is_installed(requirement):
    """Whether the package of a `name==version` line is installed completely and in that version."""
    name, version = requirement.split("==")
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return False
    return package.version.split("+")[0] == version and package.read_text("INSTALLER") is not None


def requirements(path):
    """The `name==version` lines of a file."""
    with open(path, encoding="utf-8") as file:
        lines = [line.split("#")[0].strip() for line in file]
    return [line for line in lines if line]


if __name__ == "__main__":
    wanted = [line for path in sys.argv[1:] for line in requirements(path)]
    if sys.version_info < (3, 11) or not all(map(is_installed, wanted)):
        sys.exit(1)
    print(sys.executable)

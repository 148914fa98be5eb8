"""Compare this interpreter's packages with requirements files and with requirements.lock.

    python scripts/satisfied.py requirements.txt [FILE ...]

A line of a requirements file is `name>=version`; requirements.lock holds the exact version of each as `name==version`.
Prints the interpreter's path, then what differs. Exit code 0: nothing differs. 3: versions other than those in the
lock, but all within bounds. 4: a package, or Python itself, is missing or older than its bound.

pip writes INSTALLER last, so a package whose installation was interrupted counts as missing.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LOCK = "requirements.lock"


def read_versions(path):
    """Name -> version of the lines of a requirements or lock file."""
    lines = (line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return dict(re.split(">=|==", line) for line in lines if line)


def installed(name):
    """The version of a package without its local part (`2.13.0+cpu`); None if it is not installed completely."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return None
    return package.version.split("+")[0] if package.read_text("INSTALLER") is not None else None


def release(version):
    """The numbers of a version, to compare."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def main(paths):
    bounds = {name: bound for path in paths for name, bound in read_versions(path).items()}
    locked, differing, status = read_versions(LOCK), [], 0
    for name, bound in bounds.items():
        found = installed(name)
        if found is None or release(found) < release(bound):
            differing.append(f"{name} {found or 'missing'} (at least {bound})")
            status = 4
        elif found != locked[name]:
            differing.append(f"{name} {found} ({LOCK}: {locked[name]})")
            status = status or 3
    if sys.version_info < (3, 11):
        differing, status = [f"Python {sys.version_info[0]}.{sys.version_info[1]} (at least 3.11)", *differing], 4
    print(sys.executable)
    print(", ".join(differing))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

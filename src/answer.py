"""Ask a finished model about texts, with the prompts that it was trained on.

    python src/answer.py logs_and_outputs/order_1/outputs/4-agnews --dataset TC/dbpedia --text "..."
    python src/answer.py exported --dataset TC/agnews --file texts.txt

FOLDER is a task's output folder, the adapter folder in it, or what `export.py` wrote. Prints one answer per line.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from errors import InputError, entry_point
from export import DTYPES, load_finished
from files import read_text
from prompts import read_prompts
from uie_collator import DataCollatorForUIE

logger = logging.getLogger("gorp")

BATCH_SIZE = 16


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="answer", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a task's output folder, its adapter folder, or an exported model")
    parser.add_argument("--dataset", required=True, help="TASK/NAME, whose prompt is used, such as TC/dbpedia")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text to ask about, as it would appear in the benchmark")
    source.add_argument("--file", type=Path, help="a UTF-8 file, one text per line, with \\n for a line break in a "
                        "text and \\\\ for a backslash (yelp and yahoo have \\n itself in their texts: \\\\n)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision in which the model answers")
    options = parser.parse_args(arguments)
    texts = [options.text]
    if options.file is not None:
        lines = read_text(options.file).removeprefix("\ufeff").removesuffix("\n").split("\n")
        texts = [re.sub(r"\\([n\\])", lambda found: {"n": "\n"}.get(found[1], "\\"), line) for line in lines]
    if blank := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        raise InputError(f"--text or --file: found no text in line {blank[0]}")
    try:
        found = answers(options.folder, options.dataset, texts, getattr(torch, options.dtype))
    except torch.OutOfMemoryError:
        less = "bfloat16, or " if options.dtype == "float32" else ""
        raise InputError(f"--dtype: found {options.dtype}, in which the model does not fit into the GPU's memory; "
                         f"allowed: {less}the CPU, with CUDA_VISIBLE_DEVICES= in front") from None
    for answer in found:
        print(answer.replace("\n", "\\n"))


@torch.no_grad()
def answers(run: Path, dataset: str, texts: Sequence[str], dtype: torch.dtype = torch.float32) -> list[str]:
    """The model's answers to texts, by greedy search."""
    folder, loaded = load_finished(run, dtype)
    prompts = read_prompts(folder)
    if dataset not in prompts["heads"]:
        raise InputError(f"--dataset: found {dataset}; allowed: {', '.join(prompts['heads'])}")
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    collator = DataCollatorForUIE(
        loaded.tokenizer,
        decoder_only=loaded.decoder_only,
        max_source_length=prompts["max_source_length"],
        max_target_length=prompts["max_target_length"],
    )
    task, name = dataset.split("/")
    about = {"Task": task, "Dataset": name, "subset": "test", "Samples": []}
    asked = {"label": "", "instruction": prompts["heads"][dataset]}
    examples = [about | {"Instance": asked | {"id": index, "sentence": text}} for index, text in enumerate(texts)]
    if count := collator.count_cut(examples):
        logger.warning("%d of %d texts are cut to fit a prompt of %d tokens", count, len(examples),
                       prompts["max_source_length"])
    found = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = collator(examples[start : start + BATCH_SIZE])
        inputs = {key: batch[key].to(loaded.model.device) for key in ("input_ids", "attention_mask")}
        ids = loaded.model.generate(**inputs, max_new_tokens=prompts["max_target_length"], do_sample=False)
        ids = ids[:, inputs["input_ids"].shape[1] :] if loaded.decoder_only else ids
        found += collator.decode(ids)
    return found


if __name__ == "__main__":
    sys.exit(main())

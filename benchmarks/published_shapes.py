"""Train two tasks of two steps at a published model's shapes on a CPU: where time goes, and whether memory suffices.

    python benchmarks/published_shapes.py t5-large
    python benchmarks/published_shapes.py llama-2-7b      24 GB of memory and nothing else running; about half an hour

The model has random weights. It trains on two tasks of the mini benchmark with short prompts, IMDB and SST-2, with the
flags of order 1's script except that a step has one micro-batch of one short prompt. Fifty times a second, a thread
samples what the program is doing and how much of its memory is resident; the table shows both by part. `plan_memory.py`
counts a GPU's memory, without the copies that --lamda_3 needs. Its figure is printed beside the memory that the process
uses beyond its imports.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "data")]

SHAPES = {  # name -> scripts, tokenizer, flags
    "t5-large": ("scripts", "tiny-t5", []),
    "llama-2-7b": ("scripts_llama", "tiny-llama", ["--bf16", "True", "--use_cpu", "True"]),
}
SOURCE, ANSWER = 64, 8
FEW = ["--max_steps", "2", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1",
       "--max_predict_samples", "1", "--max_source_length", str(SOURCE), "--max_target_length", str(ANSWER)]
TASKS = ["SC/IMDB", "SC/SST-2"]
PARTS = {  # function -> part; of nested ones, the innermost counts
    "load_model_and_tokenizer": "reading the model",
    "prepare": "attaching LoRA and projection",
    "train": "around the steps",
    "training_step": "forward and backward",
    "step": "optimizer",
    "revisit": "the task's end: inputs of the layers",
    "end_task": "the task's end: fold, extend S",
    "save_task": "the task's end: save",
    "predict": "answering",
    "main": "everything else",  # examples, checks, records
}
MIB = 2**20


def make_model(name: str, folder: Path, tiny: bool) -> None:
    """Save a model with random weights, in its published precision, and one of this project's tokenizers."""
    import torch

    from gpu import CONFIGS, TINY
    from model.loading import model_class

    kind = "llama" if name == "llama-2-7b" else "t5"
    config = (TINY if tiny else CONFIGS)[kind]
    config.vocab_size = CONFIGS[kind].vocab_size  # which the tokenizer needs
    config.dtype = torch.bfloat16 if name == "llama-2-7b" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(config.dtype)
    model_class(config, name)(config).save_pretrained(folder, max_shard_size="2GB")
    for path in (ROOT / "initial_model" / SHAPES[name][1]).glob("token*"):
        shutil.copy(path, folder)


def command(name: str, folder: Path) -> list[str]:
    """The arguments that the order's script would pass to `run_order.py`, for the two tasks and with few tokens."""
    from make_order import make_order

    scripts, _, flags = SHAPES[name]
    order, _ = make_order("two", TASKS, configs_dir=folder, data_dir=folder / "data")
    extra = shlex.join([*FEW, *flags])
    variables = {"MODEL": str(folder / "model"), "DATA_DIR": str(folder / "data"), "OUTPUT": str(folder / "out"),
                 "DRY_RUN": "1", "EXTRA": extra, "GORP_ENV": "active"}  # fmt: skip
    said = subprocess.run(["bash", f"{scripts}/order_1.sh"], cwd=ROOT, env=os.environ | variables, check=True,
                          stdout=subprocess.PIPE, text=True).stdout  # fmt: skip
    words = shlex.split(said)
    return [str(order), *words[words.index("configs/order1_configs") + 1 :]]


def functions() -> Iterator[str]:
    """Names of the functions of `src/` that the main thread is in, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame:
        if frame.f_code.co_filename.startswith(str(ROOT / "src")):
            yield frame.f_code.co_name
        frame = frame.f_back


def resident() -> int:
    """Bytes of this process in memory, those of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(folder: Path) -> None:
    """Run `command.json` in this process; write each part's seconds and most resident bytes to `parts.json`."""
    parts, ended = {}, threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not ended.wait(0.02):
            part = next((PARTS[name] for name in functions() if name in PARTS), None)
            part = part or (PARTS["main"] if PARTS["main"] in parts else "imports")
            now = time.perf_counter()
            seconds, most = parts.get(part, (0.0, 0))
            parts[part], last = (seconds + now - last, max(most, resident())), now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        import run_order

        status = run_order.main(json.loads((folder / "command.json").read_text()))
        assert status == 0, f"run_order: exit code {status}"
    finally:
        ended.set()
        watcher.join()
    (folder / "parts.json").write_text(json.dumps(parts))


def planned(name: str) -> int:
    """The peak that plan_memory counts, in bytes, without its assumption about a GPU's context."""
    import plan_memory

    words = ["--model_name_or_path", name, "--lora_modules", "auto", "--optim_target_modules", "auto",
             "--max_source_length", str(SOURCE), "--max_target_length", str(ANSWER)]  # fmt: skip
    words += ["--bf16", "--activation_checkpointing"] if name == "llama-2-7b" else []
    return plan_memory.make_plan(plan_memory.parse_arguments(words)).peak()[0] - plan_memory.CONTEXT


def measure(name: str, folder: Path, tiny: bool) -> None:
    """Prepare model and data in `folder`, train, and print the table."""
    python = [sys.executable, "-W", "ignore"]
    subprocess.run([*python, "data/mini_benchmark.py", "--out", folder / "data"], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    own = [*python, __file__, name, "--folder", folder, *(["--tiny"] if tiny else [])]
    subprocess.run([*own, "--part", "model"], cwd=ROOT, check=True)  # a separate process returns its memory
    (folder / "command.json").write_text(json.dumps(command(name, folder)))
    subprocess.run([*own, "--part", "run"], cwd=ROOT, check=True)
    parts = json.loads((folder / "parts.json").read_text())
    print(f"\n{name}{', tiny' * tiny}, two tasks of two steps, {SOURCE} + {ANSWER} tokens")
    print("| part | seconds | resident at most, MiB |", "|---|---|---|", sep="\n")
    for part, (seconds, most) in parts.items():
        print(f"| {part} | {seconds:.1f} | {most / MIB:,.0f} |")
    peak = max(most for _, most in parts.values())
    print(f"| all | {sum(seconds for seconds, _ in parts.values()):.1f} | {peak / MIB:,.0f} |")
    if not tiny:
        print(f"beyond the imports: {(peak - parts['imports'][1]) / MIB:,.0f} MiB; plan_memory: "
              f"{planned(name) / MIB:,.0f} MiB without a GPU's context")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="keep model and results here (default: a temporary folder)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: only checks that everything runs")
    parser.add_argument("--part", choices=("model", "run"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "model":
        make_model(args.name, args.folder / "model", args.tiny)
    elif args.part == "run":
        run(args.folder)
    elif args.folder:
        measure(args.name, args.folder.resolve(), args.tiny)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(args.name, Path(folder), args.tiny)


if __name__ == "__main__":
    main()

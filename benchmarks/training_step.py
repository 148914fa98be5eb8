"""Time and peak memory of a training step: GORP against plain LoRA, the published formulation, and full logits.

    python benchmarks/training_step.py --data CL_Benchmark --model initial_model/smollm2-135m --examples 2 --length 256

Every contender trains on the same batches (examples of SC/amazon, padded to one length) in a process of its own, so
that its memory is measured alone; the contenders take turns. After a few warm-up steps, the steps of one gap are timed,
which include exactly one refresh of the projection. Peak memory is the process's, about 0.5 GiB of imports included.

* `gorp`: an order's second task as `--method gorp` trains it: the new LoRA on q_proj and v_proj beside the frozen one,
  gate_proj at full rank, and the shared space of the first task; with trainable cores whose bases come from a sketch
  (`--galore_engine cores --galore_svd sketch`).
* `gorp, dense`: the same with ProjAdamW and the default, randomised SVD.
* `lora`: PEFT's LoRA on q_proj, v_proj and gate_proj under Hugging Face's Trainer with its AdamW.
* `lora, our logits`: the same without the logits that no target needs.
* `published`: PEFT's LoRA on q_proj and v_proj, galore-torch on gate_proj: dense gradients, an exact SVD once per gap.
* `gorp, full logits`: as `gorp`, with the stock LLaMA class, which computes logits at every position.
* `gorp, bf16`: as `gorp`, under `--bf16`; only when asked for.
* `gorp, 1 rank` and `gorp, 2 ranks`: `gorp` under ZeRO-2, with one thread and the same number of examples per rank.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
WARM_UP, GAP = 2, 10  # steps; a refresh falls on every tenth, counted from 0
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.0}
MODULES = ["--lora_modules", "auto", "--optim_target_modules", "auto", "--proj_lora_modules", "auto"]
SKETCH = ["--galore_engine", "cores", "--galore_svd", "sketch"]
ALONE = ("gorp", "gorp, dense", "lora", "lora, our logits", "published", "gorp, full logits")
TRIED = {"gorp, bf16": ["--bf16", "True"]}
RANKS = ("gorp, 1 rank", "gorp, 2 ranks")
AT_MOST, AT_LEAST = "at most", "at least"
RATIOS = (  # what, against, sense of the targets, target for time, target for peak memory
    ("gorp", "lora", AT_MOST, 1.10, 1.05),
    ("gorp", "lora, our logits", AT_MOST, None, None),
    ("gorp, dense", "lora", AT_MOST, None, None),
    ("published", "gorp", AT_LEAST, None, None),  # its target is the projected layer's, see layer_step.py
    ("gorp, full logits", "gorp", AT_LEAST, 1.2, None),
    ("gorp, bf16", "gorp", AT_MOST, None, None),
)
THROUGHPUT = 1.6  # of two ranks against one
Row = tuple[str, str, str, str]  # what, against, figure, target


# ------------------------------------------------------------------------------------- one contender


def build(contender: str, args: argparse.Namespace, output: Path):
    """The contender's trainer, before its first step."""
    from command_line import parse_arguments
    from methods import find_method
    from run_uie_lora import load_and_attach
    from task_setup import build_trainer, load_examples, load_model

    if contender == "gorp, full logits":
        from transformers import LlamaForCausalLM

        from model.answer_loss import AnswerLoss

        AnswerLoss.forward = LlamaForCausalLM.forward
    ours = contender.startswith("gorp")
    flags = flags_of(args, args.previous if ours else args.model, output)
    flags += [] if contender == "gorp, dense" else SKETCH
    flags += TRIED.get(contender, [])
    if contender in RANKS:
        flags += ["--deepspeed", str(ROOT / "configs" / "ds_configs" / "stage2.config")]
    model_args, data_args, method_args, training_args = parse_arguments(flags)
    method = find_method(method_args.method)(method_args)
    rows = load_examples(data_args, training_args, method)
    if not ours:
        return build_other(contender, load_model(model_args, data_args), rows, data_args, training_args)
    loaded, model = load_and_attach(model_args, data_args, training_args, method)
    trainer = build_trainer(model, method, loaded, rows, data_args, training_args)
    trainer.data_collator.pad_to_multiple_of = args.length
    return trainer


def build_other(contender: str, loaded, rows, data_args, training_args):
    """Hugging Face's Trainer with PEFT's LoRA, on the same batches."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, Trainer

    from task_setup import build_collator

    if contender != "lora, our logits":
        loaded.model.__class__ = LlamaForCausalLM
    collator = build_collator(loaded, data_args, training_args)
    collator.pad_to_multiple_of, collator.name_examples = data_args.max_source_length, False
    targets = ["q_proj", "v_proj"] + ([] if contender == "published" else ["gate_proj"])
    model = get_peft_model(loaded.model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **LORA))
    optimizer = None
    if contender == "published":
        from galore_torch import GaLoreAdamW

        dense = [layer.weight for name, layer in model.named_modules() if name.endswith("mlp.gate_proj")]
        for weight in dense:
            weight.requires_grad_(True)
        factors = [value for name, value in model.named_parameters() if "lora_" in name]
        projection = {"rank": 8, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std", "lr": 1e-5}
        groups = [{"params": factors}, {"params": dense, **projection}]
        optimizer = GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)
    return Trainer(model=model, args=training_args, train_dataset=rows["train"], data_collator=collator,
                   optimizers=(optimizer, None))  # fmt: skip


def flags_of(args: argparse.Namespace, model: str, output: Path, dataset: str = "amazon") -> list[str]:
    length = str(args.length)
    return [
        "--model_name_or_path", str(model), "--data_dir", str(args.data), "--output_dir", str(output),
        "--task_config_dir", str(ROOT / "configs" / "order1_configs" / dataset),
        "--instruction_file", str(ROOT / "configs" / "instruction_config.json"), "--instruction_strategy", "single",
        "--add_task_name", "True", "--add_dataset_name", "True", "--do_train", "--lora_dropout", "0",
        "--max_source_length", length, "--max_target_length", "50", "--remove_unused_columns", "False",
        "--per_device_train_batch_size", str(args.examples), "--max_steps", str(WARM_UP + GAP), "--lr_scheduler_type",
        "constant", "--learning_rate", "1e-3", "--galore_lr", "1e-5", "--lamda_1", "0", "--galore_rank", "8",
        "--galore_update_proj_gap", str(GAP), "--save_strategy", "no", "--report_to", "none", "--use_cpu", "True",
        "--max_train_samples", "200", "--disable_tqdm", "True", "--logging_strategy", "no", *MODULES, *args.extra,
    ]  # fmt: skip


def time_steps(contender: str, args: argparse.Namespace) -> None:
    """Print as JSON the seconds of each timed step and this process's peak memory during these steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == WARM_UP:
                reset_peak()
            self.ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(contender, args, Path(scratch))
        clock = Clock()
        trainer.add_callback(clock)
        if args.profile:
            return print_profile(trainer)
        trainer.train()
        ends = clock.ends[WARM_UP - 1 :]
        seconds = [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]
        if trainer.is_world_process_zero():
            print("RESULT " + json.dumps({"seconds": seconds, "peak": peak_bytes()}), flush=True)


def print_profile(trainer) -> None:
    """Print where the time of all steps goes, by operation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.train()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


def reset_peak() -> None:
    """Have `peak_bytes` count from here."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    return _status("VmHWM")


def resident_bytes() -> int:
    return _status("VmRSS")


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------- all of them


def run(contender: str, args: argparse.Namespace) -> dict:
    """The contender's result, from a process (or ranks) of its own."""
    command = [__file__, "--contender", contender, "--data", str(args.data), "--model", str(args.model), "--previous",
               str(args.previous), "--examples", str(args.examples), "--length", str(args.length), "--", *args.extra]
    threads = str(os.cpu_count())
    launch = [sys.executable]
    if contender in RANKS:
        ranks, threads = contender.split()[1], "1"
        launch += ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", str(free_port())]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"})
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        sys.exit(f"error: {contender} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(found[0].removeprefix("RESULT "))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def train_first_task(args: argparse.Namespace, scratch: Path) -> Path:
    """Train the previous task; return its adapter folder, which has its shared space."""
    output = scratch / "first"
    command = [sys.executable, "src/run_uie_lora.py", *flags_of(args, args.model, output, "dbpedia"),
               "--max_steps", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: the first task ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return output / "llama_adapter"


def measure(args: argparse.Namespace) -> dict[str, dict]:
    """Contender -> seconds of a step (mean over the gap, median over rounds) and peak bytes (largest)."""
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        args.previous = train_first_task(args, Path(scratch))
        if args.profile:
            time_steps(args.contenders[0], args)
            sys.exit()
        for _ in range(args.rounds):
            for contender in args.contenders:
                result = run(contender, args)
                mean = statistics.fmean(result["seconds"])
                print(f"{contender}: {mean:.3f} s a step, peak {result['peak'] / 2**20:,.0f} MiB", file=sys.stderr)
                found.setdefault(contender, []).append({"seconds": mean, "peak": result["peak"]})
    return {
        contender: {"seconds": statistics.median(r["seconds"] for r in results),
                    "peak": max(r["peak"] for r in results)}
        for contender, results in found.items()
    }


def results(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of the table."""
    found = measure(args)
    step = f"step of {Path(args.model).name}, {args.examples} x {args.length} tokens"
    for what, against, sense, time_target, memory_target in RATIOS:
        if what in found and against in found:
            for kind, key, target in (("time", "seconds", time_target), ("peak memory", "peak", memory_target)):
                yield row(f"{step}, {kind}: {what}", against, found[what][key] / found[against][key], sense, target)
    if set(RANKS) <= found.keys():
        ratio = 2 * found[RANKS[0]]["seconds"] / found[RANKS[1]]["seconds"]
        yield row("examples a second: 2 ranks under ZeRO-2", "1 rank, 1 thread", ratio, AT_LEAST, THROUGHPUT)


def row(what: str, against: str, ratio: float, sense: str, target: float | None) -> Row:
    if target is None:
        return what, against, f"{ratio:.2f} x", "-"
    met = ratio <= target if sense == AT_MOST else ratio >= target
    return what, against, f"{ratio:.2f} x", f"{sense} {target:g} x: {'met' if met else 'not met'}"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "CL_Benchmark", help="benchmark folder (%(default)s)")
    parser.add_argument("--model", default=str(ROOT / "initial_model" / "smollm2-135m"), help="%(default)s")
    parser.add_argument("--examples", type=int, default=2, help="examples per batch (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of an example (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="times that every contender runs (%(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=(*ALONE, *TRIED, *RANKS), default=(*ALONE, *RANKS))
    parser.add_argument("--profile", action="store_true", help="show where the time of the first contender goes")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # one of them, in its own process
    parser.add_argument("--previous", help=argparse.SUPPRESS)
    parser.add_argument("extra", nargs="*", help="after --: more flags of src/run_uie_lora.py for gorp")
    args = parser.parse_args(argv)
    args.data = args.data.resolve()
    return args


def main() -> None:
    from ranks import disconnect

    args = arguments()
    if args.contender:
        time_steps(args.contender, args)
        return disconnect()
    print("| what | against | figure | target |", "|---|---|---|---|", sep="\n")
    for line in results(args):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()

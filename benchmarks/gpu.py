"""What the published sizes cost on one GPU: models with random weights at the shapes of LLaMA-2-7B and T5-large.

    bash benchmarks/gpu.sh [SECTION ...] [--tiny]

Prints one table, and appends each row at once to `--out` as a JSON object. Sections, the most important first:

* step: tokens per second and peak memory of a training step without new bases, in a first task, where nothing is
  protected yet, and without penalties: `gorp` with the scripts' bases and with bases from a sketch, `sgorp`, PEFT's
  LoRA on the same layers, and galore-torch in place of gorp's full-rank training. All compute logits only at answers.
  Also: the overall peak against plan_memory's, and the seconds of a step with new bases and of a task's end.
* zero: a step under ZeRO-2 on one rank against one without DeepSpeed.
* agree: the tiny order's first task on the GPU and on the CPU: losses of 20 steps, weights after them, accuracies.
* resume: a task resumed from a checkpoint against the same task without interruption, with deterministic algorithms.
* svd: what galore-torch's step with new bases takes beyond an ordinary one: one exact SVD is timed and multiplied.

LLaMA: bf16, activations recomputed, 1 x (512 + 50) tokens a step. T5: float32, 4 x 512 prompt and 4 x 50 answer tokens.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, T5Config

import plan_memory
from methods import Method, make_method
from model.loading import model_class

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("step", "zero", "agree", "resume", "svd")
STEPS, WARM_UP = 5, 2
SOURCE, ANSWER = 512, 50
TIME, MEMORY, PLAN = 1.10, 1.05, 0.10  # targets: most time and memory relative to LoRA's; the plan's largest error
FIRST, LOSS = 5, 1e-3  # target: how far a loss of the first steps may be from the CPU's; rounding errors soon grow
AUTO = {"lora_modules": "auto", "optim_target_modules": ["auto"], "proj_lora_modules": "auto"}
TARGETS = {  # the ends of the names that auto chooses: of layers with LoRA, and of full-rank weights
    "llama": (["q_proj", "v_proj"], ["gate_proj"]),
    "t5": (["SelfAttention.q", "SelfAttention.v"], ["EncDecAttention.q", "EncDecAttention.v"]),
}
CONFIGS = {"llama": plan_memory.PRESETS["llama-2-7b"], "t5": plan_memory.PRESETS["t5-large"]}
TINY = {
    "llama": LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4),
    "t5": T5Config(vocab_size=256, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, decoder_start_token_id=0),
}  # fmt: skip
CONTENDERS = {  # name -> method and its options, for both models; see `Training`
    "gorp": ("gorp", {}),
    "sgorp": ("sgorp", {}),
    "lora": ("lora", {}),
    "gorp, sketch": ("gorp", {"galore_engine": "cores", "galore_svd": "sketch"}),
    "galore-torch": ("galore-torch", {}),
}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}  # one rank
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PLANNED = CUDA  # whether peaks are compared with plan_memory's


class Table:
    """A table whose rows are printed and written as soon as they are measured."""

    def __init__(self, path: Path):
        self.path, self.card, self.failed = path, torch.cuda.get_device_name() if CUDA else "no GPU", False
        print(f"{self.card}, PyTorch {torch.__version__}\n\n| what | figure | target |\n|---|---|---|", flush=True)

    def add(self, what: str, value: float | None, unit: str, target: str = "-", met: bool | None = None) -> None:
        verdict = "" if met is None else ": met" if met else ": not met"
        print(f"| {what} | {'-' if value is None else f'{value:,.4g}'} {unit} | {target}{verdict} |", flush=True)
        row = {"what": what, "value": value, "unit": unit, "target": target, "met": met, "card": self.card}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @contextlib.contextmanager
    def failure_as_row(self, what: str) -> Iterator[None]:
        """Whatever fails in the block becomes a row, and what comes after the block still runs."""
        try:
            yield
        except Exception as error:
            self.failed = True
            self.add(f"{what}: {type(error).__name__}: {str(error)[-300:]}".replace("\n", " "), None, "")


# ------------------------------------------------------------------------------------------------ one step


class Training:
    """A model with random weights, and the method or optimizer that trains it.

    Args:
        kind: llama or t5.
        name: a key of `CONTENDERS`.
        config: the model's.
    """

    def __init__(self, kind: str, name: str, config):
        self.kind, self.method, self.galore = kind, None, None
        self.rows, self.bf16 = (1, True) if kind == "llama" else (4, False)
        what, options = CONTENDERS[name]
        torch.manual_seed(0)
        with DEVICE:
            torch.set_default_dtype(torch.bfloat16 if self.bf16 else torch.float32)
            try:
                model = model_class(config, kind)(config)
            finally:
                torch.set_default_dtype(torch.float32)
        if what in ("lora", "galore-torch"):
            self.build_other(model, full_rank=what == "galore-torch")
        else:
            if self.bf16:
                options = {"galore_engine": "cores", **options}
            self.method = make_method(what, **AUTO, galore_rank=8, lora_dropout=0.0, lamda_1=0.0, **options)
            self.model = self.method.prepare(model, None, decoder_only=kind == "llama").to(DEVICE)
            self.optimizer = self.method.create_optimizer(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        self.model.train()
        if self.bf16:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.batch = self.make_batch(config.vocab_size)

    def build_other(self, model, full_rank: bool) -> None:
        """PEFT's LoRA, and for gorp's full-rank weights either LoRA as well or galore-torch's optimizer."""
        lora, projected = TARGETS[self.kind]
        targets = lora if full_rank else lora + projected
        self.model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=targets))
        factors = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not full_rank:
            self.optimizer = torch.optim.AdamW(factors, lr=1e-4)
            return
        from galore_torch import GaLoreAdamW
        from galore_torch.galore_projector import GaLoreProjector

        def one_of_them(projector, weights, rank, type):  # exact SVDs take minutes; `section_svd` times one
            shape = (weights.shape[0], rank) if type == "left" else (rank, weights.shape[1])
            return torch.linalg.qr(torch.randn(max(shape), rank, device=weights.device))[0].to(weights).reshape(shape)

        GaLoreProjector.get_orthogonal_matrix = one_of_them
        weights = [layer.weight for name, layer in self.model.named_modules() if name.endswith(tuple(projected))]
        for weight in weights:
            weight.requires_grad_(True)
        options = {"rank": 8, "update_proj_gap": 1000, "scale": 1.0, "proj_type": "std", "lr": 1e-5}
        self.optimizer = GaLoreAdamW([{"params": factors}, {"params": weights, **options}], lr=1e-4,
                                     no_deprecation_warning=True)  # fmt: skip

    def make_batch(self, vocabulary: int) -> dict[str, torch.Tensor]:
        source, answer = (torch.randint(3, vocabulary, (self.rows, n), device=DEVICE) for n in (SOURCE, ANSWER))
        if self.kind == "t5":
            return {"input_ids": source, "labels": answer}
        ids = torch.cat([source, answer], 1)
        labels = torch.cat([torch.full_like(source, -100), answer], 1)
        return {"input_ids": ids, "labels": labels, "answer_length": ANSWER}

    def step(self, model=None, backward: Callable | None = None, update: Callable | None = None) -> None:
        """One optimizer step; `backward` and `update` are those of DeepSpeed's engine."""
        if self.method is not None:
            self.method.begin_micro_batch(is_last=True)
        autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16 and model is None)
        with autocast:
            loss = (model or self.model)(**self.batch, use_cache=False).loss
        (backward or torch.Tensor.backward)(loss)
        if update:
            return update()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(run: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextlib.contextmanager
def peak() -> Iterator[list[float]]:
    """Yield a list; at the block's end its peak of allocated bytes is appended, None without a GPU."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    found: list = []
    yield found
    found.append(torch.cuda.max_memory_allocated() if CUDA else None)


def clean() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def section_step(table: Table, configs: dict) -> None:
    for kind, config in configs.items():
        found = {}
        for name in CONTENDERS:
            clean()
            with table.failure_as_row(f"{kind}: {name}"):
                found[name] = measure(kind, name, config, table)
        lora = found.pop("lora", (None, None))
        for name, measured in found.items():
            for here, there, what, most in zip(measured, lora, ("time", "peak memory"), (TIME, MEMORY)):
                if there:
                    ratio, judged = here / there, name in ("gorp", "sgorp")
                    table.add(f"{kind}: {name} / lora, {what}", ratio, "x", f"at most {most:g} x" if judged else "-",
                              ratio <= most if judged else None)  # fmt: skip


def measure(kind: str, name: str, config, table: Table) -> tuple[float, float | None]:
    """Measure a contender and add its rows; return median seconds and peak bytes of a step without new bases."""
    training = Training(kind, name, config)
    method: Method | None = training.method
    if method is not None:
        method.begin_training()
    with peak() as most:
        refresh = seconds(training.step)  # the first step computes bases
        for _ in range(WARM_UP):
            training.step()
    with peak() as ordinary:
        step = sorted(seconds(training.step) for _ in range(STEPS))[STEPS // 2]
    tokens = training.rows * (SOURCE + ANSWER)
    table.add(f"{kind}: {name}, tokens a second", tokens / step, "")
    if CUDA:
        table.add(f"{kind}: {name}, peak memory of a step", ordinary[0] / 2**30, "GiB")
    if method is not None:
        table.add(f"{kind}: {name}, first step, which computes bases", refresh, "s")
        planned = plan_of(kind, method, training)  # with --tiny too, where it only has to run
        if PLANNED:
            close = abs(planned / most[0] - 1) <= PLAN
            table.add(f"{kind}: {name}, plan_memory / peak", planned / most[0], "x", f"within {PLAN:.0%}", close)
        table.add(f"{kind}: {name}, a task's end without saving", seconds(lambda: end(method, training)), "s")
    return step, ordinary[0]


def end(method: Method, training: Training) -> None:
    method.revisit(training.model, [training.batch | {"attention_mask": torch.ones_like(training.batch["input_ids"])}])
    method.end_task()


def plan_of(kind: str, method: Method, training: Training) -> int:
    """Bytes that plan_memory expects at the peak of a step, without CUDA's own."""
    preset = {"llama": "llama-2-7b", "t5": "t5-large"}[kind]
    words = ["--model_name_or_path", preset, "--lora_modules", "auto", "--optim_target_modules", "auto",
             "--per_device_train_batch_size", str(training.rows),
             "--lora_dropout", "0", "--galore_engine", method.options.galore_engine,
             "--galore_svd", method.options.galore_svd]  # fmt: skip
    options = plan_memory.parse_arguments(words + ["--bf16", "--activation_checkpointing"] * training.bf16)
    return sum(plan_memory.make_plan(options).moments[plan_memory.STEP].values()) - plan_memory.CONTEXT


# ------------------------------------------------------------------------------------------------ the rest


def section_zero(table: Table, configs: dict) -> None:
    import deepspeed

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    os.environ |= ALONE | {"MASTER_PORT": str(port)}
    times = [zero_step(configs["llama"], None), zero_step(configs["llama"], deepspeed.initialize)]
    table.add("llama: a step under ZeRO-2 on one rank / without DeepSpeed", times[1] / times[0], "x")


def zero_step(config, initialize: Callable | None) -> float:
    """Median seconds of an ordinary step, under ZeRO-2 where DeepSpeed's `initialize` is given."""
    clean()
    training, engine, arguments = Training("llama", "gorp, sketch", config), None, {}
    if initialize is not None:
        settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
                    "zero_allow_untested_optimizer": True}  # fmt: skip
        engine = initialize(model=training.model, optimizer=training.optimizer, config=settings)[0]
        arguments = {"model": engine, "backward": engine.backward, "update": engine.step}
    training.method.begin_training(engine)
    for _ in range(1 + WARM_UP):
        training.step(**arguments)
    found = sorted(seconds(lambda: training.step(**arguments)) for _ in range(STEPS))[STEPS // 2]
    if engine is not None:
        engine.destroy()
    return found


def train(folder: Path, name: str, *extra: str) -> Path:
    """Train one task of the mini benchmark on the tiny T5 through the entry point; return its output folder."""
    command = [
        sys.executable, "src/run_uie_lora.py", "--model_name_or_path", "initial_model/tiny-t5",
        "--data_dir", str(folder / "data"), "--task_config_dir", "configs/order1_configs/dbpedia",
        "--output_dir", str(folder / name), "--do_train", "--do_predict", "--predict_with_generate",
        "--lora_modules", "auto", "--optim_target_modules", "auto", "--proj_lora_modules", "auto",
        "--lora_dropout", "0", "--max_steps", "20",
        "--per_device_train_batch_size", "8", "--max_predict_samples", "50", "--learning_rate", "1e-3",
        "--galore_lr", "1e-3", "--lr_scheduler_type", "constant", "--report_to", "none", "--save_strategy", "no",
        "--logging_steps", "1", "--add_task_name", "True", "--add_dataset_name", "True", *extra,
    ]  # fmt: skip
    variables = {name: value for name, value in os.environ.items() if name not in ALONE}
    variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return folder / name


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def difference(one: Path, other: Path) -> float:
    """The largest difference between the tensors that two tasks saved."""
    from safetensors.torch import load_file

    most = 0.0
    for path in ("adapter_model.safetensors", "full_rank_weights.safetensors"):
        a, b = (load_file(folder / "t5_adapter" / path) for folder in (one, other))
        most = max(most, *((a[name] - b[name]).abs().max().item() for name in a))
    return most


def with_mini_benchmark(section: Callable[[Table, Path], None]) -> Callable:
    def run(table: Table, configs: dict) -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            made = [sys.executable, "data/mini_benchmark.py", "--out", str(folder / "data")]
            subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
            section(table, folder)
        finally:
            shutil.rmtree(folder)

    return run


@with_mini_benchmark
def section_agree(table: Table, folder: Path) -> None:
    here, there = train(folder, "device"), train(folder, "cpu", "--use_cpu", "True")
    apart = [abs(a / b - 1) for a, b in zip(losses(here), losses(there), strict=True)]
    first = max(apart[:FIRST])
    table.add(f"the tiny T5: a loss of the first {FIRST} steps, GPU / CPU - 1", first, "", f"within {LOSS:g}",
              first <= LOSS)  # fmt: skip
    table.add(f"the same: of all {len(apart)} steps", max(apart), "")
    table.add("the same: largest difference of a weight afterwards", difference(here, there), "")
    for name, path in (("GPU", here), ("CPU", there)):
        results = json.loads((path / "predict_results.json").read_text())
        table.add(f"the same: exact match, {name}", results["predict_exact_match"], "%")


@with_mini_benchmark
def section_resume(table: Table, folder: Path) -> None:
    exact = ["--full_determinism", "True", "--save_strategy", "steps", "--save_steps", "10"]
    whole = train(folder, "whole", *exact)
    resumed = train(folder, "resumed", *exact, "--resume_from_checkpoint", str(whole / "checkpoint-10"))
    apart = difference(whole, resumed)
    table.add("a task resumed at step 10 of 20: largest difference of a weight", apart, "", "0", apart == 0)


def section_svd(table: Table, configs: dict) -> None:
    """Any matrix of a gradient's shape serves; all of a model's full-rank weights have one shape."""
    for kind, config in configs.items():
        with torch.device("meta"):
            layers = model_class(config, kind)(config).named_modules()
        shapes = [layer.weight.shape for name, layer in layers if name.endswith(tuple(TARGETS[kind][1]))]
        gradient = torch.randn(shapes[0], device=DEVICE)
        once = seconds(lambda: torch.linalg.svd(gradient, full_matrices=False))
        table.add(f"{kind}: exact SVDs of all {len(shapes)} weights (one timed, multiplied)", once * len(shapes), "s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (all of them)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to check that everything runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.jsonl", help="%(default)s")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"SECTION: found {unknown[0]}; allowed: {', '.join(SECTIONS)}")
    if not CUDA and not args.tiny:
        parser.error("no GPU was found; --tiny runs on a CPU")
    if args.tiny:
        global SOURCE, ANSWER, PLANNED
        SOURCE, ANSWER, PLANNED = 32, 8, False
    table = Table(args.out)
    for name in args.sections or SECTIONS:
        clean()
        with table.failure_as_row(name):
            globals()[f"section_{name}"](table, TINY if args.tiny else CONFIGS)
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main())

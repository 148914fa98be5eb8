"""Time the evaluation of test sets: the plain loop against ours, what each measure saves, and growth with the datasets.

    python benchmarks/evaluation.py --data CL_Benchmark --model initial_model/smollm2-135m --examples 4

The plain loop takes examples in file order, pads every prompt to one length and generates a fixed number of tokens. The
measures are then added one by one; all must give the same predictions, or the run ends with an error. A model that has
not been trained on these tasks does not stop after a label, so it is first taught to, on training examples.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.utils import logging as hf_logging

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
from benchmarks.flags import Parser, positive  # noqa: E402
from errors import InputError, entry_point  # noqa: E402
from evaluation.generate import Prediction, plan_batches  # noqa: E402
from loranew import LoraNewConfig, add_loranew, loranew_layers  # noqa: E402
from model.loading import load_model_and_tokenizer  # noqa: E402
from order_config import read_order  # noqa: E402
from token_ids import shared_ids  # noqa: E402
from uie_collator import DataCollatorForUIE  # noqa: E402
from uie_dataset_lora import ExampleOptions, read_examples  # noqa: E402

ORDER = ROOT / "configs" / "order4_configs"
INSTRUCTIONS = ROOT / "configs" / "instruction_config.json"
NEW_TOKENS, NEVER = 50, -1  # NEVER: an end token that no model generates
TARGET = 3  # times faster than the plain loop
TRAINED_LAYERS, TAUGHT_LENGTH = 2, 128
TASKS = (1, 4, 8, 15)
FINISHED, MERGE_LENGTH = 15, 64  # tasks whose LoRA is old; prompt tokens of the pass that is timed


@dataclass
class Subject:
    """A model that has learned to answer, and dataset -> its test examples, in the order's sequence."""

    name: str
    model: torch.nn.Module
    collator: DataCollatorForUIE
    rows: dict[str, list[dict]]
    batch_size: int

    @property
    def all_rows(self) -> list[dict]:
        return [row for rows in self.rows.values() for row in rows]


def load(args: argparse.Namespace) -> Subject:
    """The model, taught to answer, with `args.examples` test examples of each of the order's datasets."""
    loaded = load_model_and_tokenizer(args.model)
    collator = DataCollatorForUIE(
        loaded.tokenizer, decoder_only=loaded.decoder_only, add_task_name=True, add_dataset_name=True,
        max_source_length=args.max_source_length, max_target_length=NEW_TOKENS,
    )  # fmt: skip
    test, train = {}, []
    for row in rows_of_order(args.data, args.datasets):
        kept = train if row["subset"] == "train" else test.setdefault(row["Dataset"], [])
        if row["subset"] == "train" or len(kept) < args.examples:
            kept.append(row)
    teach(loaded.model, collator, train, args.teach)
    return Subject(Path(args.model).name, loaded.model.eval(), collator, test, args.batch_size)


def rows_of_order(data: Path, datasets: int) -> list[dict]:
    """Training and test examples of the order's first `datasets` datasets that `data` has."""
    steps = [step for step in read_order(ORDER) if any(data.glob(f"*/{step.dataset}/test.json"))][:datasets]
    if not steps:
        raise InputError(f"--data: {data} has no dataset of {ORDER.name}; expected <TASK>/<DATASET>/test.json")
    options = ExampleOptions(data, INSTRUCTIONS, max_num_instances_per_task=None, max_num_instances_per_eval_task=None)
    return [row for step in steps for row in step_rows(step, options)]


def step_rows(step, options: ExampleOptions) -> list[dict]:
    """Examples of the dataset that a step trains; its task files also name those of earlier steps."""
    rows = read_examples([step.folder], options)
    return [row for row in rows if row["Dataset"] == step.dataset]


def teach(model: torch.nn.Module, collator: DataCollatorForUIE, rows: list[dict], steps: int) -> None:
    """Train a decoder-only model's last layers, or all of a T5, on short prompts, to answer with a label and end."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    blocks = model.model.layers if collator.decoder_only else [*model.encoder.block, *model.decoder.block]
    trained = blocks[-TRAINED_LAYERS:] if collator.decoder_only else [model]
    parameters = [parameter for block in trained for parameter in block.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    lengths = collator.lengths(rows)
    short = [row for row, (prompt, _) in zip(rows, lengths) if prompt <= TAUGHT_LENGTH]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4 if collator.decoder_only else 3e-3)
    for _ in range(steps):
        batch = collator([short[index] for index in torch.randint(len(short), (8,))])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


# ------------------------------------------------------------------------------------------ contenders


@torch.no_grad()
def loop(subject: Subject, *, one_length: bool = False, stop: bool = True, loss: bool = False) -> list[list[int]]:
    """Answers in file order: prompts padded to one length or their batch's, generated to the end token or the limit."""
    rows, collator, answers = subject.all_rows, subject.collator, []
    width = max(prompt for prompt, _ in collator.lengths(rows)) if one_length else None
    for start in range(0, len(rows), subject.batch_size):
        examples = rows[start : start + subject.batch_size]
        if loss:  # as in the Trainer's step: a separate forward pass over prompts and answers
            prediction(subject, examples).loss()
        collator.pad_to_multiple_of = width
        batch = collator(examples)
        collator.pad_to_multiple_of = None
        prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
        end = {} if stop else {"eos_token_id": NEVER}
        generated = subject.model.generate(**prompts, **GENERATION, **end)
        answers += generated[:, prompts["input_ids"].shape[1] if collator.decoder_only else 1 :].tolist()
    return answers


GENERATION = {"max_new_tokens": NEW_TOKENS, "num_beams": 1, "repetition_penalty": 1.0, "do_sample": False}


def prediction(subject: Subject, rows: list[dict], *, bounded: bool = True, shared: bool = True,
               **generation) -> Prediction:
    made = Prediction(
        subject.model, subject.collator, rows, Accelerator(cpu=True), GENERATION | generation,
        batch_size=subject.batch_size, most_tokens=subject.batch_size * subject.collator.max_source_length,
        shares_prefix=shared and subject.collator.decoder_only,
    )  # fmt: skip
    made.bounded = made.bounded and bounded
    return made


def ours(subject: Subject, *, with_loss: bool = False, **options) -> list[list[int]]:
    evaluated = prediction(subject, subject.all_rows, **options)
    if with_loss:
        evaluated.loss()
    return evaluated.answers().tolist()


CONTENDERS: dict[str, Callable[[Subject], list[list[int]]]] = {
    "plain loop: file order, one length, 50 new tokens": lambda subject: loop(subject, one_length=True, stop=False),
    "+ stop at the end token": lambda subject: loop(subject, one_length=True),
    "+ padded to the batch's length": loop,
    "+ sorted by length": lambda subject: ours(subject, bounded=False, shared=False),
    "+ longest label as first bound": lambda subject: ours(subject, shared=False),
    "+ a dataset's common prefix once a batch, if decoder-only (ours)": ours,
    "ours, with the loss too": lambda subject: ours(subject, with_loss=True),
    "the Trainer's loop: file order, batch's length, loss": lambda subject: loop(subject, loss=True),
}
PLAIN, OURS = list(CONTENDERS)[0], list(CONTENDERS)[5]


def measure(subject: Subject, repeats: int) -> dict[str, float]:
    """Contender -> median seconds; they take turns, so that other load affects all of them equally.

    Raises:
        InputError: a contender's predictions differ from the plain loop's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    expected = None
    for _ in range(repeats):
        for name, contender in CONTENDERS.items():
            start = time.process_time()
            answers = contender(subject)
            seconds[name].append(time.process_time() - start)
            texts = [until_end(ids, subject.collator.tokenizer) for ids in answers]
            expected = expected or texts
            differ = sum(one != other for one, other in zip(texts, expected, strict=True))
            if differ:
                raise InputError(f"{name}: {differ} of {len(texts)} predictions differ from the plain loop's")
    return {name: statistics.median(times) for name, times in seconds.items()}


def until_end(ids: list[int], tokenizer) -> str:
    """The text of these ids up to the end token, as a run reads a prediction."""
    end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
    return tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def growth(subject: Subject, repeats: int) -> dict[int, float]:
    """Number of datasets -> seconds for all of them together, as a multiple of the seconds for them one by one."""
    names = list(subject.rows)
    counts = sorted({min(count, len(names)) for count in TASKS})

    def seconds(rows: list[dict]) -> float:
        start = time.process_time()
        prediction(subject, rows).answers()
        return time.process_time() - start

    ratios: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        alone = [seconds(subject.rows[name]) for name in names]
        for count in counts:
            together = seconds([row for name in names[:count] for row in subject.rows[name]])
            ratios[count].append(together / sum(alone[:count]))
    return {count: statistics.median(values) for count, values in ratios.items()}


def tokenising(subject: Subject) -> tuple[float, float]:
    """Seconds to tokenise the examples: for the first time, and again."""
    shared_ids.cache_clear()
    subject.collator.__post_init__()
    seconds = []
    for _ in range(2):
        start = time.process_time()
        subject.collator.lengths(subject.all_rows)
        seconds.append(time.process_time() - start)
    return seconds[0], seconds[1]


# ------------------------------------------------------------------------------------------ table


Row = tuple[str, str, str, str]  # what, against, figure, target


def results(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of the table (what, against, figure, target), as they are measured."""
    subject = load(args)
    for measured in (loops, counts_of_datasets, tokens, finished_tasks):
        for what, against, figure, target in measured(subject, args.repeats):
            yield f"{subject.name}: {what}", against, figure, target


def loops(subject: Subject, repeats: int) -> Iterator[Row]:
    """What each measure saves."""
    count, times = len(subject.all_rows), measure(subject, repeats)
    before = times[PLAIN]
    for name, seconds in times.items():
        figure = f"{1000 * seconds / count:.0f} ms an example, {times[PLAIN] / seconds:.2f} x faster"
        if name.startswith("+"):
            figure += f" (this measure {before / seconds:.2f} x)"
        met = "met" if times[PLAIN] / seconds >= TARGET else "not met"
        yield name, "plain loop", figure, f"{TARGET} x, identical predictions: {met}" if name == OURS else "-"
        before = seconds
    yield "examples that go past the first bound", "all examples", f"{past_bound(subject):.0%}", "-"


def counts_of_datasets(subject: Subject, repeats: int) -> Iterator[Row]:
    """The cost of an example as datasets are added."""
    for tasks, ratio in growth(subject, repeats).items():
        met = "met" if ratio < 1.1 else "not met"
        yield f"{tasks} datasets at once", "the sum of each alone", f"{ratio:.2f} x the time", f"1 x: {met}"


def tokens(subject: Subject, repeats: int) -> Iterator[Row]:
    """What tokenising costs, the first time and again, and how many tokens are padding."""
    first, again = tokenising(subject)
    figure = f"{1000 * first / len(subject.all_rows):.2f} ms an example"
    yield "tokenising, first time", "-", figure, "-"
    yield "tokenising, again", "first time", f"{again / first:.3f} x the time", "nothing twice"
    in_order, ordered = padding(subject)
    yield "padding when sorted by length", "in file order", f"{ordered:.0%} against {in_order:.0%} of the tokens", "-"


def finished_tasks(subject: Subject, repeats: int) -> Iterator[Row]:
    """A forward pass after 15 tasks against one after the first, with the old LoRAs beside the weights and merged."""
    modules = r".*(SelfAttention\.(q|v)|self_attn\.(q_proj|v_proj))"
    task = "CAUSAL_LM" if subject.collator.decoder_only else "SEQ_2_SEQ_LM"
    batch = subject.collator(subject.all_rows[:4])
    prompts = {name: batch[name][:, :MERGE_LENGTH] for name in ("input_ids", "attention_mask")}
    if not subject.collator.decoder_only:
        prompts["labels"] = batch["labels"]
    seconds: dict[tuple[int, bool], list[float]] = {}
    for _ in range(repeats):
        for tasks in (1, FINISHED):
            model = add_loranew(subject.model, LoraNewConfig(r=8, r_sum=8 * tasks, target_modules=modules,
                                                             task_type=task))  # fmt: skip
            model.eval()
            for merged in (False, True):
                if merged:
                    for layer in loranew_layers(model).values():
                        layer.merge_old(model.active_adapter)
                seconds.setdefault((tasks, merged), []).append(fastest_pass(model, prompts))
            subject.model = model.unload()
    times = {key: min(values) for key, values in seconds.items()}
    for merged, how in ((False, "old LoRA beside the weights"), (True, "--merge_old")):
        ratio = times[FINISHED, merged] / times[1, merged]
        target = f"1 x: {'met' if ratio < 1.1 else 'not met'}" if merged else "-"
        yield f"forward after {FINISHED} tasks, {how}", "after 1 task", f"{ratio:.2f} x the time", target
    figure = f"{times[FINISHED, False] / times[FINISHED, True]:.2f} x the time"
    yield f"forward after {FINISHED} tasks, old LoRA beside the weights", "--merge_old", figure, "-"


@torch.no_grad()
def fastest_pass(model: torch.nn.Module, inputs: dict[str, torch.Tensor], passes: int = 5) -> float:
    """Seconds of the fastest of some forward passes."""
    seconds = []
    for _ in range(passes):
        start = time.process_time()
        model(**inputs)
        seconds.append(time.process_time() - start)
    return min(seconds)


def past_bound(subject: Subject) -> float:
    """Share of the examples whose answer has not ended at the length of their dataset's longest label."""
    evaluated = prediction(subject, subject.all_rows)
    end = subject.collator.tokenizer.eos_token_id
    return statistics.mean(
        end not in answer[: evaluated.bounds[row["Dataset"]]]
        for row, answer in zip(subject.all_rows, evaluated.answers().tolist(), strict=True)
    )


def padding(subject: Subject) -> tuple[float, float]:
    """Share of a batch's tokens that are padding, in file order and sorted."""
    lengths = [prompt for prompt, _ in subject.collator.lengths(subject.all_rows)]
    in_order = [list(range(len(lengths)))[start : start + subject.batch_size]
                for start in range(0, len(lengths), subject.batch_size)]  # fmt: skip
    ordered = plan_batches(lengths, subject.batch_size, subject.batch_size * subject.collator.max_source_length)

    def wasted(batches: list[list[int]]) -> float:
        return 1 - sum(lengths) / sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)

    return wasted(in_order), wasted(ordered)


# ------------------------------------------------------------------------------------------ command line


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="benchmark folder: <TASK>/<DATASET>/*.json")
    parser.add_argument("--model", default="initial_model/tiny-t5", help="default: %(default)s")
    parser.add_argument("--examples", type=positive, default=8, help="test examples of each dataset (%(default)s)")
    parser.add_argument("--datasets", type=positive, default=15, help="the order's first N datasets (%(default)s)")
    parser.add_argument("--batch_size", type=positive, default=16, help="most examples per batch (%(default)s)")
    parser.add_argument("--max_source_length", type=positive, default=512, help="default: %(default)s")
    parser.add_argument("--teach", type=int, default=40, help="training steps before the measurement (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=1, help="default: %(default)s")
    return parser.parse_args(argv)


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    hf_logging.set_verbosity_error()  # a fixed number of tokens is requested on purpose
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, float32, processor time\n")
    print("| what | against | figure | target |\n|---|---|---|---|")
    for row in results(args):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Kill a four-task order at random moments, restart it after each kill, and compare it with an uninterrupted order.

    python benchmarks/kill_and_resume.py              # 20 kills of the tiny T5's order 1, one process
    python benchmarks/kill_and_resume.py --ranks 2    # under ZeRO-2; each kill hits one rank

Every kill is a SIGKILL to the training process, to all processes at once, or to one rank, at a moment drawn from four
kinds (see MOMENTS). Prints what each kill interrupted and how long the other processes then took to end, and finally
whether the predictions of all tasks are equal, byte by byte. Exits with 1 if they are not, or if a process outlives a
killed rank by a minute. An order that finishes before the next kill is compared, deleted and started again. With
`--out`, a second call resumes the orders of the first.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRY = "src/run_order.py"
TASKS = ("1-dbpedia", "2-amazon", "3-yahoo", "4-agnews")
PREDICTIONS = "predict_eval_predictions.jsonl"
GRACE = 60  # seconds within which everything must end after one rank was killed


def half_saved(task: Path) -> bool:
    """Whether a checkpoint or the adapter is being written."""
    checkpoints = [folder for folder in task.glob("checkpoint-*") if not (folder / "manifest.json").exists()]
    return bool(checkpoints or list(task.glob(".*adapter*.partial")))


def begun(task: Path) -> bool:
    return (task / "run_record.json").exists() and not (task / "t5_adapter").exists()


def trained(task: Path) -> bool:
    return (task / "t5_adapter").exists() and not (task / "completed.json").exists()


# Kind of moment -> condition to wait for in any task's folder, and the longest delay after it in seconds.
MOMENTS: dict[str, tuple[Callable[[Path], bool], float]] = {
    "saving": (half_saved, 0.02),
    "training": (begun, 6.0),
    "evaluation": (trained, 0.3),
    "any": (lambda task: True, 30.0),
}


class Order:
    """Order 1 of the tiny T5 in a folder of its own."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder = folder
        self.ranks = options.ranks
        self.script: subprocess.Popen | None = None
        self.environment = os.environ | {
            "OUTPUT": str(folder), "NPROC": str(options.ranks), "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix,
            "CUDA_VISIBLE_DEVICES": "",
            "EXTRA": f"--max_steps {options.steps} --max_predict_samples 8", "SAVE_STEPS": str(options.save_steps),
        }

    def start(self) -> None:
        """Start the script in a session of its own, by which `workers` finds its processes."""
        self.shown = tempfile.TemporaryFile("w+")
        self.script = subprocess.Popen(["bash", "scripts/order_1.sh", "--tiny"], cwd=ROOT, env=self.environment,
                                       stdout=self.shown, stderr=subprocess.STDOUT, start_new_session=True)

    def finish(self) -> None:
        """Run to the end."""
        self.start()
        if self.script.wait():
            sys.exit(f"error: the order ended with exit code {self.script.returncode}\n{self.said()}")

    def end(self) -> None:
        """Kill whatever is still running."""
        if self.script is not None and (self.script.poll() is None or self.workers()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.script.pid, signal.SIGKILL)

    def said(self) -> str:
        self.shown.seek(0)
        return self.shown.read()

    def wait_for(self, reached: Callable[[Path], bool]) -> bool:
        """Wait until some task's folder satisfies `reached`; False if the order ends first."""
        outputs = self.folder / "order_1" / "outputs"
        while self.script.poll() is None:
            if any(reached(outputs / task) for task in TASKS) and self.workers():
                return True
            time.sleep(0.002)
        return False

    def workers(self) -> list[int]:
        """Process ids of the training processes: those of this session that run the entry itself, not a launcher."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_text(errors="replace").split("\0")
                session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            except OSError:
                continue
            program = [word for word in words[1:] if not word.startswith("-")][:1]
            if session == self.script.pid and program == [ENTRY] and "-m" not in words:
                found.append(int(folder.name))
        return sorted(found)

    def kill(self, draw: random.Random) -> str | None:
        """Kill one process or all; return what was killed, in words, or None if nothing was left to kill."""
        workers = self.workers()
        if not workers:
            return None
        if self.ranks == 1 and draw.random() < 0.5:
            os.killpg(self.script.pid, signal.SIGKILL)
            self.script.wait()
            return "everything"
        rank = draw.randrange(len(workers))
        os.kill(workers[rank], signal.SIGKILL)
        killed = time.monotonic()
        while self.script.poll() is None or self.workers():
            if time.monotonic() - killed > GRACE:
                os.killpg(self.script.pid, signal.SIGKILL)
                sys.exit(f"error: processes outlived a killed rank by {GRACE} s\n{self.said()}")
            time.sleep(0.05)
        last = [line for line in self.said().splitlines() if line.startswith("error: ")][-1:]
        reason = re.sub(r"; its log.*", "", "".join(last))
        return f"process {rank + 1} of {len(workers)}; the rest ended in {time.monotonic() - killed:.1f} s: {reason}"

    def state(self) -> str:
        """How far the order has come, in words."""
        outputs = self.folder / "order_1" / "outputs"
        done = sum((outputs / task / "completed.json").exists() for task in TASKS)
        current = outputs / TASKS[min(done, len(TASKS) - 1)]
        checkpoints = [folder for folder in current.glob("checkpoint-*")]
        whole = sum((folder / "manifest.json").exists() for folder in checkpoints)
        adapter = ", trained" if trained(current) else ""
        partial = ", a write under way" if list(current.glob(".*.partial")) else ""
        return f"{done} tasks done, {whole} of {len(checkpoints)} checkpoints complete{adapter}{partial}"


def differing(one: Order, other: Order) -> list[str]:
    """The tasks whose predictions differ."""
    def content(order: Order, task: str) -> bytes:
        return (order.folder / "order_1" / "outputs" / task / PREDICTIONS).read_bytes()

    return [task for task in TASKS if content(one, task) != content(other, task)]


def check_equal(whole: Order, killed: Order) -> None:
    if tasks := differing(whole, killed):
        sys.exit(f"error: predictions differ from those of the uninterrupted order: {', '.join(tasks)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps per task")
    parser.add_argument("--save_steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=None, help="folder for both orders (default: a temporary one)")
    options = parser.parse_args()
    root = options.out or Path(tempfile.mkdtemp(prefix="kill_and_resume-"))
    draw = random.Random(options.seed)
    started = time.monotonic()
    whole, killed = Order(root / "whole", options), Order(root / "killed", options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` is reached
    try:
        kill_and_compare(whole, killed, draw, options.kills, started)
    finally:
        for order in (whole, killed):
            order.end()


def kill_and_compare(whole: Order, killed: Order, draw: random.Random, wanted: int, started: float) -> None:
    whole.finish()
    print(f"uninterrupted: {time.monotonic() - started:.0f} s; both orders in {whole.folder.parent}", flush=True)
    kills = 0
    while kills < wanted:
        moment = draw.choice(list(MOMENTS))
        reached, delay = MOMENTS[moment]
        killed.start()
        if killed.wait_for(reached):
            time.sleep(draw.uniform(0, delay))
            state = killed.state()
            if what := killed.kill(draw):
                kills += 1
                print(f"kill {kills} ({moment}): {state}; killed {what}", flush=True)
                continue
        if killed.script.wait():
            sys.exit(f"error: the order ended with exit code {killed.script.returncode}\n{killed.said()}")
        check_equal(whole, killed)
        print("finished before the next kill, with equal predictions; started again", flush=True)
        shutil.rmtree(killed.folder)

    killed.finish()
    check_equal(whole, killed)
    print(f"{kills} kills; predictions of all {len(TASKS)} tasks are equal; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

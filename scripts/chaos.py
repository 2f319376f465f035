"""Kills a job at random moments, again and again until it finishes, and compares what it leaves with a quiet run.

    python scripts/chaos.py --kills 20                               # the bundled model, a very small run
    python scripts/chaos.py --kills 20 --processes 2 --seed 7 --signal TERM -- +experiment=prune_unet train.steps=50 …

Everything a run leaves has to be equal to the byte: weights, scores, decisions, metrics, pictures, export. Left out is
what tells of the machine and the hour: the environment's record, the report that shows it, trackers. So that decisions
can be equal, milliseconds come from one latency table, measured beforehand: no two measurements are the same. Of a
model card the text and the scores are compared, and not the times that were measured.
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slimstep.engine.artifacts import CARD
from slimstep.engine.console import open_console
from slimstep.engine.files import digest
from slimstep.engine.preemption import CONTINUE_ME

ROOT = Path(__file__).resolve().parents[1]
# Accumulation, a worker in the loader, and 64 pairs in batches of 8: epochs end within the stage.
SMALL = [
    "+experiment=prune_unet", "search.rounds=1", "search.target_fraction=0.8", "data.pairs.size=64",
    "train.steps=24", "train.batch_size=4", "train.checkpoint_every=5", "train.accumulation=2", "train.workers=1",
    "recovery.train.steps=12", "recovery.train.batch_size=4", "recovery.train.checkpoint_every=5",
    "scoring.prompts=4", "scoring.steps=2", "scoring.batch_size=8", "eval.prompts=4", "eval.steps=2", "eval.pictures=2",
]  # fmt: skip
TABLE = ["latency.iterations=3", "latency.additive_samples=1"]
MEASURED_TIME = re.compile(r"[\d.]+ \[[\d.]+, [\d.]+\](?= times as fast)|\d+(?= ms an image)")  # in model cards
OF_THE_HOUR = ("config.yaml", "tracker.json", "unet_ms.json", "vae_ms.json", "report.html", "report", "wandb",
               "tensorboard", "benchmark", "stages")  # fmt: skip


class Campaign:
    """A quiet run, and runs that are killed, under one folder."""

    def __init__(self, folder: Path, overrides: list[str], processes: int, signals: list[signal.Signals], seed: int):
        self.folder, self.overrides, self.processes = folder, overrides, processes
        self.signals, self.dice = signals, random.Random(seed)
        self.kills = self.resumed = 0

    def run(self, kills: int) -> list[str]:
        """Kills runs until `kills` were killed, lets the last one finish; what differs from the quiet run."""
        self.measure_table()
        start = time.monotonic()
        self.finish(self.start("quiet"))
        seconds, differing = time.monotonic() - start, []
        print(f"the quiet run took {seconds:.0f} s", flush=True)
        for attempt in itertools.count():
            if self.kills >= kills:
                return differing
            name = f"killed-{attempt}"
            self.kill_until_finished(name, kills, seconds)
            for line in (self.folder / f"{name}.log").read_text(errors="replace").splitlines():
                if "not foreseen" in line:
                    print(line, flush=True)
            differing += differences(self.folder / "quiet", self.folder / name)
            shutil.rmtree(self.folder / name)

    def kill_until_finished(self, name: str, kills: int, seconds: float) -> None:
        started_before = False
        while True:
            job = self.start(name)
            self.resumed += started_before
            started_before = True
            if self.kills >= kills:
                return self.finish(job)
            delay = self.dice.uniform(0, 0.7 * seconds)
            try:
                return self.check(job, job.wait(delay))
            except subprocess.TimeoutExpired:
                self.kills += 1
                self.kill(job, self.dice.choice(self.signals))
                print(f"kill {self.kills} of {name} after {delay:.1f} s", flush=True)

    def kill(self, job: subprocess.Popen, sent: signal.Signals) -> None:
        """Sends the signal to the job and all that it started, as a scheduler does, and waits for their end."""
        try:
            family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(sent)
        _, alive = psutil.wait_procs(family, timeout=120)
        for process in alive:
            process.kill()
        code = job.wait()
        if sent == signal.SIGTERM and self.processes == 1 and code not in (CONTINUE_ME, -signal.SIGTERM, 0, 3):
            sys.exit(f"after SIGTERM the job left with {code}, not with {CONTINUE_ME}: {self.log(job)}")

    def start(self, name: str, overrides: list[str] | None = None) -> subprocess.Popen:
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        table = [f"latency.table={self.folder / 'table/latency_table/latency.json'}"] if overrides is None else []
        words = overrides or self.overrides
        named = [f"name={word.partition('=')[2]}" for word in words if word.startswith("+experiment=")]
        command = [*launcher, str(ROOT / "train.py"), *named, *words, *table,
                   f"root={self.folder / name}", f"data.cache.folder={self.folder / name / 'cache'}"]  # fmt: skip
        on_cpu = {"ACCELERATE_USE_CPU": "true"} if self.processes > 1 and not os.path.exists("/dev/nvidia0") else {}
        log = open(self.folder / f"{name}.log", "a")  # noqa: SIM115  it lives as long as the job
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **on_cpu}, start_new_session=True)

    def finish(self, job: subprocess.Popen) -> None:
        self.check(job, job.wait())

    def check(self, job: subprocess.Popen, code: int) -> None:
        if code not in (0, 3):
            sys.exit(f"the job failed with exit code {code}; its output is in {self.folder}/*.log")

    def measure_table(self) -> None:
        """Every run reads the same milliseconds."""
        model = [word for word in self.overrides if word.split("=")[0].split(".")[0] in ("model", "latency", "data")]
        self.finish(self.start("table", ["+experiment=latency_table", *TABLE, *model]))


def differences(quiet: Path, other: Path) -> list[str]:
    """The files in which two runs differ, or which one of them lacks."""
    ours, theirs = contents(quiet), contents(other)
    return [f"{other.name}/{name}" for name in sorted(ours.keys() | theirs) if ours.get(name) != theirs.get(name)]


def contents(run: Path) -> dict[str, str]:
    """What every file of a run holds, comparable between runs in different folders."""
    contents_of = {}
    for path in run.rglob("*"):
        name = path.relative_to(run)
        if path.is_file() and not set(name.parts) & set(OF_THE_HOUR):
            contents_of[str(name)] = comparable(path, run)
    return contents_of


def comparable(path: Path, run: Path) -> str:
    if path.name == CARD:
        return MEASURED_TIME.sub("", path.read_text())
    if path.suffix != ".json":
        return digest(path)
    text = path.read_text().replace(str(run), "RUN")
    value = json.loads(text)
    if path.name.endswith(".sealed.json"):
        value = {name: seal for name, seal in value.items() if not name.endswith(".json")}  # these may name the folder
    if isinstance(value, dict):
        value.pop("environment", None)
    return json.dumps(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="for the runs; emptied first")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="more than one starts torchrun")
    parser.add_argument("--signal", choices=("KILL", "TERM", "both"), default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; equal seeds kill after equal delays")
    parser.add_argument("overrides", nargs="*", help="the job, after --; without it a very small pruning run")
    options = parser.parse_args()
    if options.kills < 1 or options.processes < 1:
        parser.error(f"--kills {options.kills} and --processes {options.processes} must be at least 1")
    if options.folder.exists() and not options.folder.is_dir():
        parser.error(f"--folder {options.folder} is no folder")
    names = ("KILL", "TERM") if options.signal == "both" else (options.signal,)
    signals = [signal.Signals[f"SIG{name}"] for name in names]
    if options.folder.is_dir() and any(options.folder.iterdir()) and not (options.folder / "table.log").is_file():
        sys.exit(f"--folder={options.folder} holds something else than a campaign; name an empty or a new one")
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    folder, overrides = options.folder.resolve(), options.overrides or SMALL
    print(f"seed {options.seed}, {options.processes} process(es): {' '.join(overrides)}", flush=True)
    campaign = Campaign(folder, overrides, options.processes, signals, options.seed)
    differing = campaign.run(options.kills)
    outcome = f"differing: {', '.join(differing)}" if differing else "all equal"
    print(f"{campaign.kills} kills, {campaign.resumed} resumed, {outcome}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    open_console()
    main()

"""What trackers are sent, read from the files that they leave offline."""

import json
import struct
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from slimstep.engine.config import TrackerConfig
from slimstep.engine.run import Run
from slimstep.engine.tracking import Tracker


def tracked_run(path, kind, step):
    """One process of a run: a metric, a picture, a table."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, log_with=kind, project_dir=str(path))
    path.mkdir(exist_ok=True)
    tracker = Tracker(accelerator, TrackerConfig(log_with=kind), path, {"train": {"steps": 7}}, "abcd1234")
    run = Run(path, accelerator, tracker)
    run.log("round-00", step, {"loss": 0.5 / step})
    tracker.images("images/student", [Image.new("RGB", (4, 4))], ["a cat"])
    tracker.table("round-00/blocks", ["block", "ms"], [["mid_block.attentions.0", 1.5]])
    tracker.finish()


def records(file):
    """W&B's messages: after 7 bytes of header, LevelDB's log format, whose blocks of 32 KiB hold pieces of messages."""
    log, place, message = file.read_bytes(), 7, b""
    assert log[:4] == b":W&B"
    while place < len(log):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", log[place : place + 7])
        message += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield Record.FromString(message)
            message = b""


def whole(file, seconds=60):
    """The records up to the one that ends a run: W&B's own process may write them after `finish` has returned."""
    end = time.monotonic() + seconds
    while (kinds := [record.WhichOneof("record_type") for record in records(file)])[-1:] != ["exit"]:
        assert time.monotonic() < end, f"{file} ends with {kinds[-1:]}"
        time.sleep(0.2)
    return list(records(file))


@pytest.fixture(autouse=True)
def without_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_an_offline_run_holds_config_metrics_pictures_and_tables_and_goes_on_as_itself(tmp_path):
    for step in (1, 2):  # the second process is a continued run
        tracked_run(tmp_path / "run", "wandb", step)
    files = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    found = [whole(file) for file in files]
    runs = [record.run for part in found for record in part if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {"abcd1234"} and {run.project for run in runs} == {"slimstep"}
    configs = [record.config for part in found for record in part if record.WhichOneof("record_type") == "config"]
    assert {item.key: json.loads(item.value_json) for item in configs[0].update}["train"] == {"steps": 7}
    for step, part in zip((1, 2), found, strict=True):
        history = {}
        for record in part:
            if record.WhichOneof("record_type") == "history":
                history |= {"/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json)
                            for item in record.history.item}  # fmt: skip
        assert history["round-00/loss"] == 0.5 / step and history["round-00/step"] == step
        assert history["images/student/_type"] == "images/separated"
        assert history["round-00/blocks/_type"] == "table-file"
    tables = list(tmp_path.glob("run/wandb/offline-run-*/files/media/table/**/*.json"))
    assert json.loads(tables[0].read_text())["data"] == [["mid_block.attentions.0", 1.5]]


def test_the_processes_stay_connected_for_the_next_stage_of_a_chain(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        tracked_run(tmp_path / "run", "wandb", 1)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()


def test_tensorboard_gets_the_same(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracked_run(tmp_path / "run", "tensorboard", 3)
    (file,) = tmp_path.glob("run/**/events.out.tfevents.*")
    events = reader.EventAccumulator(str(file))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("round-00/loss")] == [(3, pytest.approx(0.5 / 3))]
    assert events.Tags()["images"] and events.Tags()["tensors"]

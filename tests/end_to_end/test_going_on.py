"""Runs that go on: what was done is skipped, what a signal or a kill broke off ends with the same bits."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import forked
import numpy as np
import psutil  # accelerate brings it
import pytest
from tiny import MAIN_LINE, PLAIN, ROOT, STAGES, TWO_RANKS, launch, train

from esol.data.index import Index


def test_a_killed_mask_stage_redoes_only_what_is_missing(config: Path, one: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(one, tmp_path / "run"))
    folder = run / "irn_masks"
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob("shard-*")}
    for name in ("manifest.json", "index.json", "shard-000002.tar", "shard-000005.tar.counts.npz"):
        (folder / name).unlink()
    damaged = bytearray((folder / "shard-000003.tar").read_bytes())
    damaged[700] ^= 1  # of the same size
    (folder / "shard-000003.tar").write_bytes(damaged)
    os.truncate(folder / "shard-000006.tar.counts.npz", 100)
    again = train(config, "--set", f"run_dir={run}", "--set", "tracking.uri=none")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before with these settings, skipped") == len(STAGES) - 1
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob("shard-*")}
    assert {name: data for name, (data, _) in before.items()} == {name: data for name, (data, _) in after.items()}
    redone = {name for name in before if before[name][1] != after[name][1]}
    assert redone == {f"shard-00000{i}.tar{end}" for i in (2, 3, 5, 6) for end in ("", ".counts.npz")}


def test_finished_stages_are_skipped_and_changed_ones_run_again(config: Path, one: Path) -> None:
    results = one / "results.json"
    had = results.read_text()
    results.unlink()  # as where the folders of stages were brought from elsewhere
    again = train(config, "--set", "tracking.uri=none")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before with these settings, skipped") == len(STAGES)
    assert results.read_text() == had
    shutil.copytree(one, config.parent / "runs/changed")
    here = ("--set", "run_dir=runs/changed", "--set", "tracking.uri=none")
    other_split = train(config, *here, "--set", "data.score_split=train", "--stages", "classify")
    assert "classify: done before with these settings, skipped" in other_split.stdout
    short = ("--stages", ",".join(MAIN_LINE[:5]))
    changed = train(config, *here, "--set", "shrink.area=0.5", "--set", "data.workers=0", *short)
    # classify, decide, expand: how many workers read changes nothing
    assert changed.stdout.count("settings, skipped") == 3
    assert "shrink: runs again, shrink.area: 1.0 -> 0.5" in changed.stdout
    assert "localize: runs again, its input shrink changed" in changed.stdout
    accepted = (config.parent / "runs/changed/resolved.yaml").read_text()
    stale = train(config, *here, "--set", "expand.alpha=2", "--stages", "shrink")
    assert stale.returncode == 2
    why = "shrink needs expand in runs/changed, but expand.alpha: 1.0 -> 2.0: add expand to --stages"
    assert f"error: {why}" in stale.stderr
    assert (config.parent / "runs/changed/resolved.yaml").read_text() == accepted
    early = train(config, "--set", "run_dir=runs/none", "--stages", "expand")
    assert early.returncode == 2
    assert "expand needs classify in runs/none, but it has not finished: add classify, decide to" in early.stderr
    assert not (config.parent / "runs/none").exists()
    lonely = train(config, "--set", "stages=[classify, localize, irn]")
    assert "error: stages: irn needs irn_labels; add it to stages" in lonely.stderr


def test_kept_features_stand_for_the_photos_and_change_nothing(config: Path, one: Path, shard_set: Path) -> None:
    """decide keeps them; expand and shrink, which see the same crops, then read no photo."""
    run, photos = config.parent / "runs/kept", config.parent / "damaged"
    shutil.copytree(one, run)
    heads = ("decide", "expand", "shrink")
    for stage in heads:
        shutil.rmtree(run / stage)
    options = ["--set", f"run_dir={run}", "--set", "tracking.uri=none", "--set", "tracking.pictures=0"]
    kept = [*options, "--set", "data.features=0.1", "--resume", "--stages"]
    done = train(config, *kept, "decide")
    assert done.returncode == 0, done.stderr
    shutil.copytree(shard_set, photos)
    index = Index.load(str(photos))
    for shard, spec in enumerate(index.shards):
        data = bytearray((photos / spec.name).read_bytes())
        for ordinal in np.flatnonzero(index.shard_of == shard):
            place = int(index.members[index.image_ext(int(ordinal))][ordinal, 0])
            data[place : place + 100] = bytes(100)
        (photos / spec.name).write_bytes(data)
    damaged = ["--set", f"data.root={photos}"]
    done = train(config, *kept, "expand,shrink", *damaged)
    assert done.returncode == 0, done.stderr
    for stage in heads:
        assert (run / stage / "model.safetensors").read_bytes() == (one / stage / "model.safetensors").read_bytes()
    shutil.rmtree(run / "shrink")
    without = train(config, *options, "--resume", "--stages", "shrink", *damaged)
    assert without.returncode == 2
    assert "holds other bytes than were indexed" in without.stderr


@pytest.mark.parametrize(("stage", "steps"), [("classify", 120), ("segment", 60)])  # seconds behind the twentieth
def test_a_signal_to_the_whole_group_saves_and_resume_ends_bit_identical(config: Path, stage: str, steps: int) -> None:
    """Schedulers signal data workers too; they must not take the main process down before it has saved."""
    options = ["--stages", stage, "--set", "tracking.uri=none", "--set", f"{stage}.duration={steps} steps"]
    options += ["--set", "segment.masks=truth"]
    assert train(config, *options, "--set", f"run_dir=runs/whole-{stage}").returncode == 0
    broken = config.parent / f"runs/broken-{stage}"
    options += ["--set", f"run_dir={broken}", "--set", "checkpoint.every=50"]
    command = [*PLAIN, str(ROOT / "esol/train.py"), "--config", str(config), *options]
    log = broken / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=config.parent, start_new_session=True, stdout=subprocess.PIPE, text=True)
    while not log.exists() or '"step": 20' not in log.read_text():
        assert process.poll() is None, "ended before the signal"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGTERM: stopped after step" in output
    assert "go on with --resume" in output
    resumed = train(config, *options, "--resume")
    assert f"{stage}: resumed after step" in resumed.stdout
    whole = config.parent / f"runs/whole-{stage}"
    assert (broken / stage / "model.safetensors").read_bytes() == (whole / stage / "model.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["USR1 to the entry point", "kill -9 of the launcher"])
def test_ranks_behind_a_launcher_save_and_end(config: Path, how: str) -> None:
    """launch/entrypoint.sh gives back the code 75 that torchrun replaces; without a launcher the ranks end as well."""
    run_dir = config.parent / f"runs/{how[:4]}"
    entry = [str(ROOT / "launch/entrypoint.sh"), *TWO_RANKS, str(ROOT / "esol/train.py"), "--config", str(config)]
    options = ("tracking.uri=none", "classify.duration=100000 steps", f"run_dir={run_dir}", "checkpoint.every=100000")
    command = [*entry, "--stages", "classify", *(part for text in options for part in ("--set", text))]
    process = subprocess.Popen(command, cwd=config.parent, stdout=subprocess.PIPE, text=True)
    log = run_dir / "metrics.jsonl"
    while not log.exists() or '"step": 20' not in log.read_text():
        assert process.poll() is None, "ended before the signal"
        time.sleep(0.05)
    if how.startswith("USR1"):
        process.send_signal(signal.SIGUSR1)
    else:
        psutil.Process(process.pid).children()[0].kill()
    output, _ = process.communicate(timeout=60)  # until the last rank has closed it
    assert process.returncode == (75 if how.startswith("USR1") else 128 + 9)
    assert "stopped after step" in output
    assert list((run_dir / "classify/checkpoints").glob("step-*[0-9]"))


def test_checkpoint_of_another_config_and_wrong_world_are_refused(config: Path) -> None:
    options = ["--stages", "classify", "--set", "tracking.uri=none", "--set", "run_dir=runs/other"]
    nowhere = train(config, *options, "--set", "data.root=nowhere")
    assert nowhere.returncode == 2
    assert "error: nowhere/index.json is missing" in nowhere.stderr
    odd = launch(TWO_RANKS, config, *options, "--set", "classify.global_batch=1")
    assert odd.returncode != 0
    assert (
        "global_batch = 1 is too small for 2 processes, each of which needs an image: set global_batch to 2"
        in odd.stderr
    )


def test_a_run_that_was_killed_behind_its_last_checkpoint_keeps_its_results(
    config: Path, one: Path, tmp_path: Path
) -> None:
    options = ["--stages", "classify", "--set", "tracking.uri=none", "--set", "run_dir=runs/late"]
    kill = "import os, sys; from esol import train; from esol.pipeline.store import Store; sys.argv[0] = 'train.py'\n"
    kill += "Store.finish = lambda *_: os._exit(9)\nsys.exit(train.main())"
    (tmp_path / "kill.py").write_text(kill)
    environment, words = {**os.environ, "PYTHONPATH": str(ROOT)}, ("--config", str(config), *options)
    killed = forked.run(tmp_path / "kill.py", *words, cwd=config.parent, env=environment, timeout=120)
    assert killed.returncode == 9
    resumed = train(config, *options, "--resume")
    assert "classify: resumed after step 12" in resumed.stdout, resumed.stderr
    runs = (config.parent / "runs" / name / "results.json" for name in ("late", "one"))
    ours, whole = (json.loads(path.read_text())["classify"] for path in runs)
    assert ours.keys() == whole.keys()
    assert ours["loss"] == whole["loss"]

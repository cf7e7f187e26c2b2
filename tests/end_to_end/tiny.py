"""A tiny run, as users start it."""

import os
import subprocess
import sys
from pathlib import Path

import forked

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# shrink does not clip: where features meet the clip its gradient jumps, and the last digit decides which way; labels
# have fixed thresholds: those that a map names move with its last digit
MAIN_LINE = ["classify", "decide", "expand", "shrink", "localize", "seed_masks"]
STAGES = [*MAIN_LINE, "affinity_masks", "psa_labels", "psa", "psa_masks", "irn_labels", "irn", "irn_mean", "irn_masks"]
STAGES += ["vote_masks", "segment", "evaluate"]
TINY = """
model: {backbone: small, weights: none, output_stride: 8, freeze: none, kernel_channels: 16}
data: {score_split: val, long_side: [48, 72], crop: 48, workers: 1}
classify: {duration: 2 epochs, global_batch: 8, lr_batch: 8, optimizer: adamw, lr: 1e-4, head_lr: 1}
decide: {duration: 4 steps, global_batch: 8, lr_batch: 8}
expand: {duration: 4 steps, global_batch: 8, lr_batch: 8, lr: 0.05}
shrink: {duration: 4 steps, global_batch: 8, lr_batch: 8, lr: 0.02, clip: 0}
localize: {scales: [1.0], batch: 4, write: cam}
psa_labels: {alpha_low: 4, alpha_high: 32}
psa: {duration: 4 steps, crop: 48}
irn_labels: {foreground: 0.3, background: 0.05}
irn: {duration: 4 steps, global_batch: 8, lr_batch: 8, crop: 48, scale: [1.0, 1.5], radius: 4}
segment:
  masks: irn_masks
  model: {backbone: small, weights: none}
  duration: 4 steps
  global_batch: 8
  lr_batch: 8
  crop: 65
  inputs: [1.0, 0.5]
evaluate: {scales: [1.0, 1.5]}
engine: {threads: 1, stall: 3}  # minutes: a run that stands says where before the test gives up
checkpoint: {every: 3}
tracking: {every: 2, pictures: 3, page: 9}
"""
TINY += f"stages: [{', '.join(STAGES)}]\n"  # with the two that runs have only where they are named
TRAINING = ["classify", "decide", "expand", "shrink", "psa", "irn", "segment"]
PLAIN = [sys.executable]
TWO_RANKS = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "launch/cpu.yaml"), "--num_processes"]


def launch(launcher: list[str], config: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """esol/train.py behind a launcher, in the folder of its config."""
    program = ROOT / "esol/train.py"
    command = [*launcher, str(program), "--config", str(config), *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "OMP"))} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=config.parent)


def train(config: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What launch(PLAIN, ...) gives, without the seconds in which libraries are loaded: a forked process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "OMP"))} | variables
    program, words = ROOT / "esol/train.py", ("--config", str(config), *arguments)
    return forked.run(program, *words, cwd=config.parent, env=environment, timeout=240)


def esol(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command `esol` with these arguments, in a forked process."""
    environment = {k: v for k, v in os.environ.items() if k != "ESOL_WEIGHTS"} | variables
    return forked.run(BIN / "esol", *map(str, words), cwd=Path.cwd(), env=environment, timeout=280)

"""Names of the files in a run's folder."""

from __future__ import annotations

CONFIG = "config.yaml"
"""The resolved configuration."""
METRICS = "metrics.jsonl"
"""One JSON object per logged step and per evaluation."""
METRICS_CSV = "metrics.csv"
"""The numbers of metrics.jsonl as a table."""
TRACKERS = "trackers.json"
"""Ids of the run at Weights & Biases and MLflow."""
SUMMARY = "summary.json"
"""The final evaluation of the best weights, as eval.py --json writes it."""
BAD_IMAGES = "bad_images.txt"
"""One unreadable training image per line."""
SPLIT = "split.txt"
"""Validation images that are held out of the training split, one per line."""
LOCK = ".lock"
"""Locked by the process that trains in the folder."""
CHECKPOINTS = "checkpoints"
"""Folder of best.pt and step_….pt, each with its digest."""
DIGEST_SUFFIX = ".sha256"
"""End of the name of the file with the digest of a checkpoint."""
TENSORBOARD = "tensorboard"
"""Folder of the TensorBoard events."""
WANDB = "wandb"
"""Folder of Weights & Biases."""
MLFLOW = "mlruns"
"""Folder of MLflow, without a server."""

FILES = (CONFIG, METRICS, METRICS_CSV, TRACKERS, SUMMARY, BAD_IMAGES, SPLIT, LOCK)
FOLDERS = (CHECKPOINTS, TENSORBOARD, WANDB, MLFLOW)

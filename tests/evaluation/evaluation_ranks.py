"""What a process of a distributed test does; imported by each, so it imports little."""

from __future__ import annotations

import dataclasses
import datetime
import json

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from vil.config import ConfigError
from vil.evaluation.accuracy import evaluate

IMAGES = (11, 2)


def drawn(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features or logits (images, classes) and targets (images,)."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(images, classes)).astype(np.float32))
    return logits, torch.from_numpy(rng.integers(0, classes, images))


def evaluate_in_worlds(process: int, folder: str) -> None:
    """Evaluates a fixed linear model as one rank of 1, 2 and 3; writes what this rank got."""
    torch.set_num_threads(1)
    model = nn.Linear(12, 12)
    with torch.no_grad():
        model.weight.copy_(drawn(12, 12, seed=1)[0])
        model.bias.zero_()
    for world_size in range(process + 1, 4):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting_{world_size}",
            rank=process,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=120),
        )
        for images in IMAGES:
            features, targets = drawn(images, 12)
            mine = slice(process, None, world_size)
            loader = list(zip(features[mine].split(2), targets[mine].split(2))) if process < images else []
            found = evaluate(model, loader, device=torch.device("cpu"), precision="float32")
            if world_size == 3 and images == 2:  # the last rank has no image
                with open(f"{folder}/{process}.refused", "w") as file:
                    try:
                        evaluate(
                            model, loader, device=torch.device("cpu"), precision="float32", class_count=13
                        )
                    except ConfigError as error:
                        file.write(str(error))
            with open(f"{folder}/{images}_{world_size}_{process}.json", "w") as file:
                json.dump(dataclasses.asdict(found), file)
        dist.destroy_process_group()

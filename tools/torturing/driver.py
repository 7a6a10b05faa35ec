"""train.py with a trouble in one of its ranks.

    python driver.py KIND RANK FIRST LAST SECONDS options of train.py        as in `Trouble`

Nothing of train.py is changed for it: the method that computes a part of a step is wrapped.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@dataclass(frozen=True)
class Trouble:
    """What happens to one rank.

    Attributes:
        kind: `nan`: its images are NaN; `hang`: it sleeps.
        rank: the rank.
        first, last: the steps, counted from 1.
        seconds: that it sleeps.
    """

    kind: str
    rank: int
    first: int
    last: int
    seconds: float = 0.0

    def words(self) -> list[str]:
        """As the driver's command line has it."""
        return [self.kind, str(self.rank), str(self.first), str(self.last), str(self.seconds)]


def run(words: Sequence[str], trouble: Trouble | None) -> int:
    """train.py with `words`, in this process; its exit status."""
    import train
    from vil import command_line

    if trouble is not None:
        afflict(trouble)
    sys.argv = ["train.py", *words]
    try:
        command_line.main(train.main)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def afflict(trouble: Trouble) -> None:
    """Wraps what every step calls, in this process."""
    from vil.training.trainer import _Trainer

    compute: Callable[..., Any] = _Trainer.accumulate
    train_all: Callable[..., Any] = _Trainer.run

    def accumulate(self: Any, images: Any, *others: Any) -> Any:
        if self.process.rank == trouble.rank and trouble.first <= self.step + 1 <= trouble.last:
            if trouble.kind == "nan":
                images = images * float("nan")
            else:
                time.sleep(trouble.seconds)
        return compute(self, images, *others)

    def run_and_tell(self: Any) -> None:
        train_all(self)
        digest = hashlib.sha256()
        for value in self.model.state_dict().values():
            digest.update(value.cpu().contiguous().numpy().tobytes())
        print(f"[rank {self.process.rank}] weights {digest.hexdigest()}", file=sys.stderr, flush=True)

    _Trainer.accumulate = accumulate  # type: ignore[method-assign]
    _Trainer.run = run_and_tell  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, rank, first, last, seconds = sys.argv[1:6]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does, before PyTorch is imported
    raise SystemExit(run(sys.argv[6:], Trouble(kind, int(rank), int(first), int(last), float(seconds))))

import os

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. It reads the variable when they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _short_measurement_of_speed():
    """Every training and evaluation ends by measuring images per second, by default for three seconds."""
    from vil.evaluation import cost

    cost.SPEED_SECONDS = 0.05


@pytest.fixture(autouse=True, scope="session")
def _index_folder(tmp_path_factory):
    """Keep indexes of data sets out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield

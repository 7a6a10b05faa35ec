"""Converts any checkpoint to safetensors that say by themselves what they are.

    python tools/convert.py runs/digits digits.safetensors              the best weights of a run
    python tools/convert.py model_best.pth vil.safetensors --released-config config.yaml

The file holds the weights under this project's names, and in its metadata the model's configuration, the
class names and the evaluation transform. `eval.py --checkpoint`, `train.py --model.init_from` and
`vil.create_model(None, checkpoint=…)` read it. Reading safetensors never runs code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vil.command_line import ToolParser, main
from vil.models.released import open_model
from vil.runtime.files import refuse_input_as_output
from vil.weight_files import write_safetensors


def convert(words: Sequence[str]) -> None:
    """Reads, checks that the weights fit their model, and writes."""
    parser = ToolParser(prog="convert.py", description=__doc__.splitlines()[0])
    parser.add_checkpoint()
    parser.add_argument("output", help="the safetensors file to write")
    arguments = vars(parser.parse_args(words))
    output = arguments.pop("output")
    inputs = [path for path in (arguments["checkpoint"], arguments["released_config"]) if path]
    refuse_input_as_output(Path(output), inputs, "output")
    _, file = open_model(**arguments)
    write_safetensors(output, file)
    size = Path(output).stat().st_size / 1e6
    print(f"{output}: {len(file.weights)} tensors, {file.kind} weights, {size:.1f} MB")


if __name__ == "__main__":
    main(convert)

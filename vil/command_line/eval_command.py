"""The command line of eval.py."""

from __future__ import annotations

from collections.abc import Sequence

from vil.command_line.resolution import ParsedArguments, ResolvedConfig
from vil.config import EvalConfig
from vil.errors import UserError
from vil.validation import INITIALIZATION, timm_start_options


def resolve_eval_command(
    argv: Sequence[str],
) -> tuple[ParsedArguments[EvalConfig], ResolvedConfig[EvalConfig]]:
    """Return the parsed command line, and its configuration without that of any checkpoint.

    Raises:
        UserError: an option or a file cannot be used, options do not go together, or nothing is to evaluate.
        SystemExit: after --help, and after --print_config unless other files add to the configuration.
    """
    args = ParsedArguments(EvalConfig, argv, prog="eval.py")
    command = args.resolve()
    config = command.config
    if not (args.print_config or config.checkpoint or config.released_config or command.sets("model")):
        reason = "nothing to evaluate: give --checkpoint RUN, --model FILE or --model.name"
        raise UserError("checkpoint", reason)
    for key in ("weights", "run_checkpoint"):
        if key in command.origins and not config.checkpoint:
            raise command.locate(UserError(key, "requires --checkpoint"))
    for name in INITIALIZATION:
        key = f"model.{name}"
        if key in command.origins and getattr(config.model, name):
            raise command.locate(UserError(key, "is for training; evaluate weights with --checkpoint"))
    has_stored_values = config.checkpoint or config.released_config or config.datasets
    if not has_stored_values and not timm_start_options(config.model.timm_options):
        args.finish(command)
    return args, command

"""Check that torch.compile works on this machine."""

from __future__ import annotations

import torch

from vil.errors import UserError, one_line


def check_compiler(device: torch.device, backend: str | None = None) -> None:
    """Compile and run a small function, as a test of compilers, headers and folders that torch.compile needs.

    Args:
        device: of the tensors.
        backend: of torch.compile; None is inductor.

    Raises:
        UserError: it fails, for example without a C++ compiler, or on a GPU without a C compiler.
    """

    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    options = {} if backend is None else {"backend": backend}
    try:
        torch.compile(double, **options)(torch.ones(8, device=device))  # type: ignore[call-overload]
    except Exception as error:  # each compiler raises other types
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"torch.compile does not work on this machine: {one_line(first_line)}"
        raise UserError("compile", reason) from None

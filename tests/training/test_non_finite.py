import pytest
import torch

from vil.training.non_finite import NonFiniteSkipper, loss_grad


def test_the_gradient_of_a_loss_that_is_not_finite_is_nan():
    for loss, expected in ((2.0, 1.0), (float("inf"), float("nan")), (float("nan"), float("nan"))):
        assert loss_grad(torch.tensor(loss)).item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_fused_optimizer_skips_on_the_device(momentum: float):
    """From the first step on, or from the second if the first one allocates momentum."""
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum, fused=True)
    skipper = NonFiniteSkipper(optimizer, model)
    for step, is_finite in enumerate((True, False, True)):
        before = model.weight.detach().clone()
        model.weight.grad = torch.full_like(model.weight, 1.0 if is_finite else torch.nan)
        skipper.save_statistics()
        skipper.step(torch.tensor(is_finite))
        assert torch.equal(before, model.weight) != is_finite
        assert isinstance(optimizer.found_inf, torch.Tensor) == (step > 0 or not momentum)

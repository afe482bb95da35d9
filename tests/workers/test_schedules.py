import pytest
import torch

from moe.errors import SpecError
from workers.schedules import constant, cosine_warmup, exponential_per_epoch, one_cycle


def rates(scheduler, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def test_exponential_changes_between_epochs_only():
    assert [exponential_per_epoch(0.5, 3)(step) for step in range(7)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    assert constant()(10**6) == 1
    with pytest.raises(SpecError):
        exponential_per_epoch(0.5, 0)


def test_cosine_with_warmup():
    multiplier = cosine_warmup(4, 12)
    assert [multiplier(step) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert multiplier(8) == pytest.approx(0.5)
    assert multiplier(12) == pytest.approx(0) and multiplier(30) >= 0
    assert cosine_warmup(0, 10)(0) == 1
    assert cosine_warmup(20, 10)(9) == 0.45
    with pytest.raises(SpecError):
        cosine_warmup(1, 0)


@pytest.mark.parametrize("steps", [20, 50, 400])
def test_one_cycle_is_torchs(optimizer, steps):
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, pct_start=0.1)
    wanted = rates(scheduler, optimizer, steps - 1)
    multiplier = one_cycle(steps)
    assert [multiplier(step) for step in range(steps - 1)] == pytest.approx(wanted, abs=1e-6)
    assert max(map(multiplier, range(steps))) == pytest.approx(1)


def test_one_cycle_of_few_steps():
    assert all(0 < one_cycle(steps)(step) <= 1 for steps in (1, 2, 3, 9) for step in range(steps))
    with pytest.raises(SpecError):
        one_cycle(10, warmup=1.5)

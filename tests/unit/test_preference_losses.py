"""Losses that learn from preferences, against values that were computed by hand."""

import math

import pytest
import torch

from ray_jobs.diffusion.objectives import Diffusion, Draws, FlowMatching, LossSettings, Objective, add_noise
from ray_jobs.diffusion.preferences import dpo_losses, implicit_rewards, kto_losses, kto_reference_point


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_reward_is_half_of_beta_times_what_the_reference_denoises_worse() -> None:
    losses, reference = torch.tensor([0.10, 0.30]), torch.tensor([0.14, 0.29])
    # 100 / 2 * (0.14 - 0.10) = 2, 100 / 2 * (0.29 - 0.30) = -0.5
    torch.testing.assert_close(implicit_rewards(losses, reference, 100.0), torch.tensor([2.0, -0.5]))


def test_dpo_by_hand() -> None:
    found = dpo_losses(torch.tensor([2.0, 0.0]), torch.tensor([-0.5, 0.0]))
    assert found.tolist() == pytest.approx([-math.log(sigmoid(2.5)), math.log(2)])


def test_dpo_pulls_apart_with_the_share_that_is_not_yet_apart() -> None:
    chosen = torch.tensor([0.7], requires_grad=True)
    dpo_losses(chosen, torch.tensor([0.2])).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-sigmoid(-0.5))


def test_dpo_is_finite_where_a_pair_is_far_on_the_wrong_side() -> None:
    assert dpo_losses(torch.tensor([-500.0]), torch.tensor([500.0])).item() == pytest.approx(1000)


def test_kto_by_hand() -> None:
    rewards, liked = torch.tensor([2.0, 1.0]), torch.tensor([True, False])
    point = kto_reference_point(rewards.sum(), torch.tensor(2.0))
    assert point.item() == 1.5
    found = kto_losses(rewards, liked, point)
    # 1 - sigmoid(2 - 1.5), and 1 - sigmoid(-(1 - 1.5))
    assert found.tolist() == pytest.approx([1 - sigmoid(0.5), 1 - sigmoid(0.5)])


def test_the_reference_point_of_kto_is_no_less_than_none_and_has_no_gradient() -> None:
    rewards = torch.tensor([-3.0, 1.0], requires_grad=True)
    point = kto_reference_point(rewards.sum(), torch.tensor(2.0))
    assert point.item() == 0 and not point.requires_grad


def objectives() -> list[Objective]:
    alphas = torch.linspace(0.99, 0.01, 10)
    return [Diffusion(alphas, "epsilon"), Diffusion(alphas, "v_prediction"), FlowMatching(10)]


@pytest.mark.parametrize("objective", objectives(), ids=["epsilon", "velocity", "flow"])
def test_a_better_prediction_of_the_target_is_rewarded_for_every_objective(objective: Objective) -> None:
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    posed = add_noise(objective, latents, Draws(torch.tensor([0.3, 0.8]), noise), LossSettings())
    reference = posed.losses(posed.target + 0.2)  # an error of 0.04 in each element
    better = posed.losses(posed.target + 0.1)  # of 0.01
    rewards = implicit_rewards(better, reference, 100.0)
    torch.testing.assert_close(rewards, torch.full((2,), 50 * (0.04 - 0.01)))

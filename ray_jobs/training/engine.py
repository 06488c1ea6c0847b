"""A model in training on one rank, whatever shards it: forward and backward passes, steps, state.

Two engines do this: `Flat` (flat.py) keeps the trained parameters, their gradients and the optimizer's state
in few flat tensors; `ZeRO` (zero.py) is DeepSpeed's, for what only DeepSpeed offers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ray_jobs.config import OPTIMIZER_SETTINGS, TrainConfig
from ray_jobs.data.feeding.order import rows_of_rank
from ray_jobs.diffusion.pack import Trainable
from ray_jobs.training.fragments import Fragment
from ray_jobs.training.optimizers import SCALARS, ScheduleFree, evaluate, moments_of
from ray_jobs.training.phases import Stage


class Engine(ABC):
    """A model in training on one rank.

    Attributes:
        module: the model; its parameters are on `device`, in the configured precision.
        optimizer: over the fp32 tensors that this rank updates. Its groups are those of `parameter_groups`,
            in that order.
        optimizer_name: its name in `train.optimizer`.
        skipped: steps that were left out because their gradient was not finite.
    """

    module: Trainable
    device: torch.device
    rank: int
    world_size: int
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    skipped: int = 0

    @abstractmethod
    def accumulate(self, inputs: dict[str, Any], weights: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Run a piece forward and backward; return its part of the step's loss: float32, on the device.

        Args:
            inputs: arguments of `module`.
            weights: float32, N: weight of each image in the step's loss.
            last: whether this is the step's last piece.
        """

    @abstractmethod
    def update(self, told: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip the summed gradient and take an optimizer step. All ranks must call this.

        Args:
            told: float32 vector of values to sum over all ranks.

        Returns:
            The sums, and the gradient's norm before clipping: float32 scalar. Both are on the device, so that
            reading them may wait.
        """

    @property
    @abstractmethod
    def held(self) -> list[Fragment]:
        """All that this rank's optimizer updates."""

    @property
    @abstractmethod
    def owned(self) -> list[Fragment]:
        """The fragments that this rank saves and averages; each element is owned by exactly one rank."""

    @property
    def averaged(self) -> dict[str, torch.Tensor]:
        """Views of all weights that this rank owns, by a name: fp32 vectors."""
        return {piece.key: piece.weights for piece in self.owned}

    def average(self, averages: Mapping[str, torch.Tensor], piece: Fragment) -> torch.Tensor:
        """Return an owned fragment's elements of vectors like those of `averaged`."""
        return averages[piece.key]

    @property
    def evaluated(self) -> dict[str, torch.Tensor]:
        """The weights to evaluate and publish where there are no averages, named as in `averaged`."""
        if self.optimizer_name != ScheduleFree.name:
            return self.averaged
        found = {name: weights.clone() for name, weights in self.averaged.items()}
        [first_beta] = {group["betas"][0] for group in self.optimizer.param_groups}
        for piece in self.owned:
            state = self.state_of(piece.owner)
            if state["step"]:
                evaluate(self.average(found, piece), piece.of(state["unaveraged"]), first_beta)
        return found

    @property
    @abstractmethod
    def gradient_bytes(self) -> int:
        """Bytes of gradients that this rank keeps between backward pass and step."""

    def moments_of(self, owner: torch.Tensor) -> dict[str, torch.Size]:
        """Return the tensors that the optimizer keeps for one that it updates: their shapes by name."""
        return moments_of(self.optimizer_name, owner.shape)

    @property
    def scalars(self) -> dict[str, float]:
        """Numbers that the optimizer keeps for a tensor beside `step`, as they are before the first step."""
        return SCALARS.get(self.optimizer_name, {})

    def state_of(self, owner: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of a tensor that the optimizer updates; zeros before the first step.

        It has the optimizer's moments and scalars, and `step`, which counts its steps, if it counts any.
        """
        state: dict[str, torch.Tensor] = self.optimizer.state[owner]
        if "step" not in state:
            state["step"] = torch.zeros((), device=self._step_device(owner))
        for name, value in self.scalars.items():
            state.setdefault(name, torch.full((), value, device=self._step_device(owner)))
        for name, shape in self.moments_of(owner).items():
            if name not in state:
                state[name] = owner.new_zeros(shape)
        return state

    def use_optimizer(self, name: str) -> None:
        """Take the steps to come with another optimizer; one that changes begins without moments."""
        assert name == self.optimizer_name, "the configuration allows a change only where it is possible"

    def _step_device(self, owner: torch.Tensor) -> torch.device:
        """Return the device on which the optimizer counts its steps."""
        return torch.device("cpu")

    def restart(self, names: Iterable[str]) -> None:
        """Set the moments and the step count of the named parameters to 0, as before the first step.

        While parameters are frozen, their moments decay and their steps are counted where the optimizer
        updates them together with others.

        Args:
            names: parameter names. Of the parameters that the optimizer updates as one tensor, name all or
                none.
        """
        wanted = set(names)
        for piece in self.held:
            if piece.name in wanted:
                state = self.state_of(piece.owner)
                state["step"].zero_()
                for name, value in self.scalars.items():
                    state[name].fill_(value)
                for kind, shape in self.moments_of(piece.owner).items():
                    (piece.of(state[kind]) if shape == piece.owner.shape else state[kind]).zero_()

    def set_hyperparameters(self, stage: Stage, step: int) -> None:
        """Set the optimizer's learning rates, weight decay and what else it has for a step.

        Frozen layers stay in the optimizer with a learning rate of 0, so that the division among ranks does
        not change.
        """
        set_hyperparameters(self.optimizer, stage, step)

    def enter_stage(self, stage: Stage, before: Stage | None) -> None:
        """Enable gradients for the layers of a stage and disable them for all others.

        Args:
            before: the stage that has just ended, or None in the middle of a stage. The optimizer's state is
                reset if it is another one, and for layers that `before` did not train.
        """
        if before:
            self.use_optimizer(stage.optimizer)
        for layers, members in self.module.layer_groups.items():
            if before and stage.trains(layers) and not before.trains(layers):
                self.restart(members)
            for parameter in members.values():
                parameter.requires_grad_(stage.trains(layers))


def rows_a_worker(config: TrainConfig, world_size: int) -> int:
    """Return the most rows that a rank has in a step."""
    return len(rows_of_rank(config.batch_size, world_size, 0))


def pieces_a_step(config: TrainConfig, world_size: int) -> int:
    """Return the number of pieces (micro-batches) into which every rank splits its rows of a step."""
    most = rows_a_worker(config, world_size)
    return -(-most // (config.micro_batch_size or most))


def parameter_groups(model: Trainable) -> list[dict[str, Any]]:
    """Return the optimizer's groups: per group of layers, parameters with weight decay and those without.

    Biases and norms are not decayed.
    """
    found = []
    for layers, members in model.layer_groups.items():
        for decays in (True, False):
            parameters = [p for p in members.values() if (p.ndim > 1) == decays]
            if parameters:
                found.append({"params": parameters, "layers": layers, "decays": decays})
    return found


def set_hyperparameters(optimizer: torch.optim.Optimizer, stage: Stage, step: int) -> None:
    """Set an optimizer's learning rates, weight decay and what else it has for a step of a stage."""
    rate, names = stage.rate(step), {"betas": "betas", "epsilon": "eps", "momentum": "momentum"}
    own = {
        names[setting]: getattr(stage, setting)
        for setting, having in OPTIMIZER_SETTINGS.items()
        if stage.optimizer in having
    }
    for group in optimizer.param_groups:
        active = stage.trains(group["layers"])
        group["lr"] = rate if active else 0.0
        group["weight_decay"] = stage.weight_decay if active and group["decays"] else 0.0
        group.update(own)

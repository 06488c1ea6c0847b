"""A training in plain PyTorch, in this process: what Ray, DeepSpeed, restarts and workers must not change."""

import numpy as np
import pyarrow.parquet as pq
import torch

from ray_jobs.config import Config
from ray_jobs.data.encoding.tensors import as_torch, read_tensors
from ray_jobs.data.feeding.dataset import Dataset
from ray_jobs.diffusion.ema import EMA
from ray_jobs.training.batch import InputMaker, Piece, loss_shares
from ray_jobs.training.engine import parameter_groups, set_hyperparameters
from ray_jobs.training.loop import LoopSettings
from ray_jobs.training.optimizers import build_optimizer
from ray_jobs.training.phases import stage_at, stages_of
from ray_jobs.training.setup import build_model


class PlainTraining:
    """Trains on prepared rows, one by one read from their files, in fp32 and without sharding."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        self.config, self.dataset = config, dataset
        pipeline, self.model = build_model(config)
        device = torch.device("cpu")
        self.inputs = InputMaker(
            pipeline.vae,
            self.model,
            dataset.empty_caption(),
            device,
            seed=config.seed,
            caption_dropout=config.train.caption_dropout,
        )
        self.optimizer = build_optimizer("adamw", parameter_groups(self.model), config.train)
        self.norms: list[float] = []  # of each step's gradient, before it is clipped
        self.ema = EMA(self.model.trained(), config.train.ema_decay)
        records, of_class = dataset.parts("train"), dataset.parts("class")
        stream = LoopSettings(config, dataset, "plain", [1]).stream(1, self.inputs.columns)
        joined = config.train.prior_loss_weight > 0
        order = stream.joined_order(records, of_class, 1 << 10) if joined else stream.order(records, 1 << 10)
        self.order, self.records = order, [*records, *of_class]

    def batch(self, step: int) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Captions and tensors of the rows of a step."""
        [window] = self.order.windows(step, step)
        [found] = self.order.steps(window)
        texts, rows = [], []
        for part, row in found.rows.tolist():
            with self.dataset.cache.open_input(self.records[part]["file"]) as file:
                table = pq.read_table(file)
            texts.append(table["text"][row].as_py())
            tensors = read_tensors(table, list(self.inputs.columns))
            rows.append({name: values[row] for name, values in tensors.items()})
        columns = {name: np.stack([row[name] for row in rows]) for name in self.inputs.columns}
        return texts, {name: as_torch(values) for name, values in columns.items()}

    def row_losses(self, step: int) -> torch.Tensor:
        """The loss of each row of a step."""
        rows = self.batch(step)[1]
        places = list(range(self.config.train.batch_size))
        inputs, _ = self.inputs.make(Piece(rows, places, [0.0] * len(places)), step)
        losses: torch.Tensor = self.model(**inputs)
        return losses

    def run(self, last: int, first: int = 1) -> list[float]:
        """The loss of each step from `first` to `last`."""
        train = self.config.train
        stages, shares, losses = stages_of(train, last), torch.tensor(loss_shares(train)), []
        trained = [parameter for _, parameter in self.model.trained()]
        for step in range(first, last + 1):
            set_hyperparameters(self.optimizer, stage_at(stages, step), step)
            loss = (self.row_losses(step) * shares).sum()
            loss.backward()
            self.norms.append(torch.nn.utils.clip_grad_norm_(trained, train.max_grad_norm).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.model.trained(), step)
            losses.append(loss.item())
        return losses

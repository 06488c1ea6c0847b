"""Shares of an epoch: of sources by their weights, or of the values of `data.balance`, which are equal."""

from collections.abc import Sequence

from ray_jobs.config import DataConfig
from ray_jobs.data.encoding.plan import PartRecord
from ray_jobs.data.feeding.order import Part


def mixture(data: DataConfig, records: Sequence[PartRecord]) -> tuple[list[Part], dict[int, float]]:
    """Return the parts of an order, each with the number of its group, and the weights of the groups.

    Groups are the sources, with their configured weights if there are any; with `data.balance` the values of
    that column, with equal ones.
    """
    if data.balance is None:
        return [Part(each["rows"], each["bucket"], each["source"]) for each in records], data.weights
    numbers = {value: number for number, value in enumerate(sorted({each["value"] for each in records}))}
    parts = [Part(each["rows"], each["bucket"], numbers[each["value"]]) for each in records]
    return parts, dict.fromkeys(numbers.values(), 1.0)

"""What a search draws from: ranges, the kind of number that a setting is, and the points of the space."""

import json
import math
import random
from collections.abc import Callable, Mapping
from itertools import combinations, product
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import Field, ValidationError, model_validator

from ray_jobs.config.effects import Effect
from ray_jobs.config.fields import Section, explain
from ray_jobs.config.train import TrainConfig

DIGITS = 3  # significant ones of a drawn number: more would mean nothing, and names stay short
MOST_DRAWS = 1000  # a trial, until the space counts as exhausted

Settings = dict[str, Any]


class Range(Section):
    """A range to draw values from, for `search.algorithm` random or optuna."""

    affects: ClassVar = Effect.SCORES

    low: float = Field(description="lowest value")
    high: float = Field(description="highest value")
    log: bool = Field(True, description="draw uniformly in the logarithm; false: in the value itself")

    @model_validator(mode="after")
    def _is_a_range(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low: {self.low:g} must be below high: {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low: {self.low:g} must be above 0, or log be false")
        return self


class IntegerRange(Range):
    """A range of a setting that is a whole number; both ends are among its values."""

    low: int
    high: int


Values = list[Any] | Range
Dimensions = dict[str, Values]
Trains = Callable[[Settings], TrainConfig]


def annotation(name: str) -> Any:
    """The type of a setting of `train`, as `train.lora.rank`; None where it has none: an entry of a free
    mapping such as train.deepspeed, or an unknown name."""
    section, *path = name.split(".")
    found: Any = TrainConfig if section == "train" else None
    for each in path:
        if not (isinstance(found, type) and issubclass(found, Section) and each in found.model_fields):
            return None
        found = found.model_fields[each].annotation
    return found


def number_kind(name: str) -> type[int] | type[float] | None:
    """int or float, what a setting of `train` is; None: no number."""
    left = [annotation(name)]
    while left:
        kind = left.pop()
        if kind in (int, float):
            return int if kind is int else float
        if get_origin(kind) is Annotated:
            left.append(get_args(kind)[0])
        elif get_origin(kind) is Union or isinstance(kind, type(int | None)):
            left += get_args(kind)
    return None


def range_of(name: str, values: Range) -> Range:
    """The range of a setting, of whole numbers where the setting is one.

    Raises:
        ValueError: the setting is no number, or its range ends between two whole ones.
    """
    kind = number_kind(name)
    if kind is None:
        raise ValueError("a range needs a setting of train that is a number; give values instead")
    if kind is float:
        return values
    for field, end in (("low", values.low), ("high", values.high)):
        if end != int(end):
            raise ValueError(f"{field}: {end:g}: must be a whole number, like the setting")
    return IntegerRange(low=int(values.low), high=int(values.high), log=values.log)


def ends(values: Values) -> list[Any]:
    """The values, or the two ends of a range: the limits of a setting hold between them too."""
    return [values.low, values.high] if isinstance(values, Range) else values


def read_values(space: Mapping[str, Values], trial: Trains) -> Dimensions:
    """The space with its values as their settings read them; one that is equal already stays (0 is 0.0).

    Args:
        trial: what a trial with some settings trains with.

    Raises:
        ValueError: a value is refused, or stands there twice.
    """
    found: Dimensions = {}
    for name, values in space.items():
        read = [_read(name, _trained({name: value}, trial)) for value in ends(values)]
        if isinstance(values, list):
            pairs = zip(values, read, strict=True)
            values = [given if given == as_read else as_read for given, as_read in pairs]
            if any(one == other for one, other in combinations(values, 2)):
                raise ValueError(f"search.space.{name} repeats a value: {values}")
        found[name] = values
    return found


def check_pairs(dimensions: Dimensions, trial: Trains) -> None:
    """Raise ValueError if two values, each in order by itself, do not go together.

    No rule of `train` binds more than two of the settings that can be searched.
    """
    for one, other in combinations(dimensions, 2):
        for value, beside in product(ends(dimensions[one]), ends(dimensions[other])):
            _trained({one: value, other: beside}, trial)


def _trained(settings: Settings, trial: Trains) -> TrainConfig:
    given = "search.space." + " with ".join(f"{name}: {value!r}" for name, value in settings.items())
    try:
        return trial(settings)
    except ValidationError as error:
        raise ValueError(explain(error, given, TrainConfig)) from None
    except ValueError as error:
        raise ValueError(f"{given}: {error}") from None


def _read(name: str, train: TrainConfig) -> Any:
    """What a setting of a trial is, as JSON has it."""
    value: Any = train.model_dump(mode="json", exclude_unset=True)
    for each in name.split(".")[1:]:
        value = value[each]
    return value


def within(low: float, high: float, number: float) -> float:
    """A drawn number to three digits, inside its range."""
    return min(max(float(f"{number:.{DIGITS}g}"), low), high)


def nearest(values: Range, number: float) -> float:
    """A number as a setting with this range takes it: a whole one, or one of three digits."""
    if isinstance(values, IntegerRange):
        return min(max(round(number), values.low), values.high)
    return within(values.low, values.high, number)


def sample(values: Values, draw: random.Random) -> Any:
    """One value of a dimension of the space."""
    if not isinstance(values, Range):
        return draw.choice(values)
    # A whole number stands for all that is rounded to it, also at the ends.
    half = 0.5 if isinstance(values, IntegerRange) else 0.0
    low, high = values.low - half, values.high + half
    if not values.log:
        return nearest(values, draw.uniform(low, high))
    return nearest(values, math.exp(draw.uniform(math.log(low), math.log(high))))


def num_points(dimensions: Dimensions) -> float:
    """Number of points of the space; infinite with a range that is not of whole numbers."""
    sizes: list[float] = []
    for each in dimensions.values():
        if isinstance(each, IntegerRange):
            sizes.append(each.high - each.low + 1)
        else:
            sizes.append(math.inf if isinstance(each, Range) else len(each))
    return math.prod(sizes)


def grid(dimensions: Dimensions) -> list[Settings]:
    """Every combination of values, the last dimension fastest."""
    lists = [values for values in dimensions.values() if isinstance(values, list)]
    return [dict(zip(dimensions, values, strict=True)) for values in product(*lists)]


def drawn(dimensions: Dimensions, count: int, seed: int) -> list[Settings]:
    """Different points of the space at random, the same again for a seed; the first ones stay where more
    are asked for.

    Raises:
        ValueError: there are not so many, to three digits of a number.
    """
    draw, found = random.Random(seed), dict[str, Settings]()
    for _ in range(MOST_DRAWS * count):
        point = {name: sample(values, draw) for name, values in dimensions.items()}
        found.setdefault(json.dumps(point, sort_keys=True), point)
        if len(found) == count:
            return list(found.values())
    raise ValueError(
        f"search.num_trials: {count}, but the ranges give only {len(found)} different trials; lower it or "
        "widen the ranges"
    )

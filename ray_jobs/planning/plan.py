"""Plan of a run on a cluster: placement, memory, batches, cost."""

from cluster.capacity import encoders, search_actors, serving_actors, trials_at_once
from cluster.shape import Machine, Placed, place
from ray_jobs.config import Config, ConfigError
from ray_jobs.console import GIB, human_size
from ray_jobs.data.encoding.shapes import picture_shapes
from ray_jobs.diffusion.memory import pictures_at_once
from ray_jobs.diffusion.precision import PRECISIONS
from ray_jobs.planning.estimate import effective_stage, host_memory
from ray_jobs.planning.inference import needs
from ray_jobs.planning.memory import HEADROOM, Model, misfit, room_of_a_rank
from ray_jobs.planning.packs import largest_trial, with_pack
from ray_jobs.run.folder import RunFolder
from ray_jobs.run.manifest import MANIFEST, Manifest
from ray_jobs.training.engine import pieces_a_step, rows_a_worker
from ray_jobs.weights.captioner import captioner_bytes

WHOLE_BATCHES = ("drawing", "embedding")  # others are of as many pictures as are decoded at once


def memory_lines(config: Config, model: Model, machines: list[Machine]) -> tuple[list[str], list[str]]:
    """Describe a rank's memory; also return the problems, with fixes, if it does not fit."""
    train, workers, together = config.train, config.train.min_workers, config.trials_together
    parts, found = model.footprint(train), model.memory(train, together)
    stage = effective_stage(train, workers)
    lines = [
        f"model: {parts.whole(train.method):,} parameters, {parts.trained:,} trained "
        f"({train.method}, {train.precision})",
        f"memory per rank, ZeRO stage {stage} on {workers} worker{'s' * (workers > 1)}"
        + (f", {together} trials together " if together > 1 else " ")
        + "(activations from a forward pass without data, the rest is arithmetic):",
    ]
    for name, size in vars(found.device).items():
        away = getattr(found.offloaded, name)
        lines.append(
            f"    {name.replace('_', ' '):<15}{human_size(size)}"
            + (f"  + {human_size(away).strip()} on the host" * bool(away))
        )
    lines.append(f"    {'in all':<15}{human_size(found.device.whole)}")
    host = host_memory(
        train,
        base=parts.base,
        trained=together * parts.trained,
        workers=workers,
        quantized=parts.quantized,
        quantized_bytes=parts.quantized_bytes,
        blocks=parts.blocks,
        moments=parts.moments,
    )
    lines.append(
        f"    {'on the host':<15}{human_size(host)}, while the base is read and checkpoints are written"
    )
    room = room_of_a_rank(config, machines)
    if room is None:
        return lines, []
    lines.append(f"    {'room per rank':<15}{human_size(room)}")
    problem = misfit(config, model, room)
    return lines, [problem] if problem else []


def drawing_lines(config: Config, machines: list[Machine]) -> tuple[list[str], list[str]]:
    """Describe the memory of encoders, evaluators and replicas; also return what does not fit, with fixes."""
    train, evaluate, serve, data = config.train, config.evaluate, config.serve, config.data
    kinds = {
        "an encoder": ("data.encode_precision", data.encode_precision, train.use_gpu, 1.0),
        "an evaluator": ("evaluate.precision", evaluate.precision, evaluate.use_gpu, evaluate.gpu_share),
        "a replica": ("serve.precision", serve.precision, serve.use_gpu, serve.gpu_share),
    }
    batches = (data.encode_batch_size, evaluate.batch_size, serve.max_batch_size)
    try:
        found = needs(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    lines, problems = [], []
    for (kind, (field, precision, use_gpu, share)), need, most in zip(
        kinds.items(), found, batches, strict=True
    ):
        picture = ", ".join(f"{human_size(size).strip()} {doing}" for doing, size in need.picture.items())
        host = f" and {human_size(need.host).strip()} on the host" * bool(need.host)
        others = "feature networks" if kind == "an evaluator" else "data.control"
        host += f" and {human_size(need.networks).strip()} of {others}" * bool(need.networks)
        models = f" of {need.engines} models, while a new champion is loaded" * (need.engines > 1)
        line = f"memory of {kind} ({precision}): weights {human_size(need.weights).strip()}{host}{models}; "
        line += f"a picture {picture}"
        sizes = [machine.gpu_gib for machine in machines if machine.gpus and machine.gpu_gib]
        if use_gpu and sizes:
            room = int(HEADROOM * share * min(sizes) * GIB)
            fitting = need.at_once(room)
            chunk = min(most, pictures_at_once(data.resolution, data.resolution))
            limits = {doing: most if doing in WHOLE_BATCHES else chunk for doing in fitting}
            held = ", ".join(
                f"{min(limits[doing], count)} of {limits[doing]} {doing}" for doing, count in fitting.items()
            )
            line += f"; there is room for {held} at once"
            if not min(fitting.values()):
                way = f"{field}: bf16" if precision == "fp32" else "devices with more memory"
                way = "serve.offload: encoders or model" if kind == "a replica" and not need.host else way
                way += ", or serve.fuse_champion: false" * (need.engines > 1 and serve.fuse_champion)
                problems.append(
                    f"{kind} needs {human_size(need.least).strip()} with one picture and has "
                    f"{human_size(room).strip()}: {way}"
                )
        lines.append(line)
    return lines, problems


def captioning_lines(config: Config, machines: list[Machine]) -> tuple[list[str], list[str]]:
    """Describe the memory of the captioning model, if there is one; also return what does not fit."""
    data = config.data
    if data.captioning.model is None:
        return [], []
    try:
        weights = captioner_bytes(data.captioning, PRECISIONS[data.encode_precision])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    size = human_size(weights).strip()
    line = (
        f"memory of the captioning model ({data.encode_precision}): weights {size}, and what up to "
        f"{data.encode_batch_size} pictures at once take"
    )
    sizes = [machine.gpu_gib for machine in machines if machine.gpus and machine.gpu_gib]
    room = int(HEADROOM * min(sizes) * GIB) if config.train.use_gpu and sizes else weights + 1
    if weights < room:
        return [line], []
    return [line], [f"data.captioning.model needs more than {size} and has {human_size(room).strip()}"]


def known_rows(config: Config) -> int:
    """Return the rows of an epoch; 0 before the data set is prepared."""
    dataset = RunFolder.of(config).dataset
    return Manifest.read(dataset).rows_an_epoch if dataset.exists(MANIFEST) else 0


def of_known_length(config: Config) -> Config:
    """Return the configuration with a ladder, if the number of steps is known yet."""
    rows = known_rows(config)
    return config.with_ladder(rows) if rows or not config.train.epochs else config


def batch_lines(config: Config) -> list[str]:
    """Describe the sizes of a step, of an epoch (if the dataset is prepared), and of the search."""
    train, workers = config.train, config.train.min_workers
    rows, pieces = rows_a_worker(train, workers), pieces_a_step(train, workers)
    lines = [
        f"a step: {train.batch_size} pictures over {workers} workers = at most {rows} a worker, in {pieces} "
        f"micro batch{'es' * (pieces > 1)} of at most {-(-rows // pieces)}"
    ]
    ladder, rows_an_epoch = config.search.ladder, known_rows(config)
    if rows_an_epoch and ladder:
        epoch = rows_an_epoch / train.training_rows
        trial = f"a trial: {ladder[-1] / epoch:,.1f} epochs"
        lines.append(f"an epoch: {rows_an_epoch:,} rows = {epoch:,.1f} steps; {trial}")
    else:
        lines.append("an epoch: not known before the data set is prepared")
    if config.not_together:
        lines.append(config.not_together)
    if not ladder:
        lines.append(f"a trial: {train.epochs:g} epochs; its steps, and those of the search, likewise")
        return lines
    last = ladder[-1]
    steps, planned = config.search.most_steps, config.search.planned_steps
    budget = config.search.max_steps
    least = f", or {planned:,} by successive halving" if planned < steps else ""
    least += f", or {budget:,} by search.max_steps" if budget and budget < planned else ""
    lines.append(f"the search: at most {steps // last} trainings x {last:,} = {steps:,} steps{least}")
    return lines


def cost_lines(config: Config, images_per_second: float | None) -> list[str]:
    """Describe hours and cost of the trainings, at a speed measured in a run (`images/s` in its lines)."""
    if not config.search.ladder:
        return ["hours: not known before the data set is prepared"]
    if not images_per_second:
        by_itself = ", without search.pack: with it they tell each trial's share"
        told = "as a run's lines tell it" + (by_itself if config.trials_together > 1 else "")
        return [f"hours: give --images-per-second, of one trial, {told}"]
    steps = min(config.search.planned_steps, config.search.max_steps or config.search.planned_steps)
    seconds = steps * config.train.batch_size / images_per_second
    hours = seconds / 3600 * config.train.min_workers
    lines = [
        f"hours at {images_per_second:g} images/s: at most {hours:,.2f} of workers, "
        f"{seconds / 3600 / trials_at_once(config):,.2f} on the clock (without start-up and evaluation)"
    ]
    if price := config.search.device_hour_price:
        lines.append(f"cost at {price:g} a worker's hour: at most {hours * price:,.2f}")
    return lines


def placement_lines(title: str, placed: Placed) -> list[str]:
    """Describe the number of actors of each kind per machine."""
    lines = [f"{title}:"]
    for name, held in placed.held.items():
        inside = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in held.items())
        lines.append(f"    {name:<13}{inside or 'nothing'}")
    return lines


def plan(config: Config, machines: list[Machine], images_per_second: float | None) -> tuple[str, bool]:
    """Compose the plan's text; also return True if everything fits.

    Raises:
        ConfigError: the pictures' size does not suit the model.
    """
    config = of_known_length(config)
    model = Model(config)
    picture_shapes(config)
    config, of_pack = with_pack(config, model, machines)
    lines = [f"cluster: {machine.describe()}" for machine in _grouped(machines)]
    problems: list[str] = []
    stages = {"train and evaluate": search_actors(config), "serve": serving_actors(config)}
    if config.data.encode == "cache" or config.data.captioning.model:
        stages = {"prepare": encoders(config, 1)} | stages
    for title, actors in stages.items():
        placed = place(actors, machines)
        lines += placement_lines(title, placed)
        problems += [f"{title}: {each}" for each in placed.left_over]
    memory = memory_lines(largest_trial(config, model), model, machines)
    for found, too_much in (
        memory,
        drawing_lines(config, machines),
        captioning_lines(config, machines),
    ):
        lines += found
        problems += too_much
    lines += [of_pack] if of_pack else []
    lines += [*batch_lines(config), *cost_lines(config, images_per_second)]
    lines += [f"does not fit: {problem}" for problem in problems] or ["all fits"]
    return "\n".join(lines), not problems


def _grouped(machines: list[Machine]) -> list[Machine]:
    """Group equal machines into one of each kind, named by its count."""
    kinds: dict[tuple[float, float, float | None, float | None], list[Machine]] = {}
    for machine in machines:
        kinds.setdefault(machine.size, []).append(machine)
    return [Machine(f"{len(of_kind)} x", *size) for size, of_kind in kinds.items()]

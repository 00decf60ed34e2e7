"""How a run is carried out, as against what is learned: nothing here is part of a model."""

from dataclasses import dataclass

from models_ml.shards import MOST_GB, Cache


@dataclass(frozen=True)
class Plan:
    """What decides the weights, beside the model and its data. batch_size: request rows of a step over all ranks.
    warm_up: share of the steps in which the rate rises; then it falls as a cosine to nothing."""

    epochs: int
    batch_size: int
    learning_rate: float
    warm_up: float = 0.0


@dataclass(frozen=True)
class TrainerSettings:
    """The `trainer:` part of a configuration file.

    accumulate: parts a step's rows are worked through in, for batches that do not fit. precision: fp32 or bf16 (autocast; the
    weights stay fp32). clip_norm: bound on the norm of all gradients, embeddings among them. checkpoint_every: steps.
    keep: newest checkpoints kept; the best is kept beside them. validation_share: of the row groups, the last in time;
    0 trains on everything. patience: validations without a better loss before training stops; 0 never stops early.
    workers: reading threads. prefetch: batches made ahead. cache_mb: decoded rows kept between epochs.
    rank_timeout_s: how long ranks wait for one another. compiled: through torch.compile, which takes a minute at the start.
    shard_rows: embedding tables with so many rows are split by rows over the ranks; 0 splits none.
    request_rows: a folder or URL (s3://…) with the request rows of this export, to read instead of writing them in the home.
    cache_dir: where copies of what lies at a URL go (default: `cache/` in the home); where it is set, what lies in a folder (a
    slow mount) is copied too. cache_dir_gb: most that it may hold.
    """

    accumulate: int = 1
    precision: str = "fp32"
    clip_norm: float = 5.0
    checkpoint_every: int = 200
    keep: int = 2
    validation_share: float = 0.0
    validate_every: int = 200
    patience: int = 0
    workers: int = 2
    prefetch: int = 4
    cache_mb: int = 1024
    rank_timeout_s: float = 300.0
    tensorboard: bool = False
    compiled: bool = False
    shard_rows: int = 0
    request_rows: str = ""
    cache_dir: str = ""
    cache_dir_gb: float = MOST_GB

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        for name in ("accumulate", "checkpoint_every", "keep", "validate_every", "workers", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share must be in [0, 1), got {self.validation_share}")
        if self.cache_dir_gb <= 0:
            raise ValueError(f"cache_dir_gb must be positive, got {self.cache_dir_gb}")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive, got {self.clip_norm}")

    def cache_of(self, where: str) -> Cache | None:
        """What copies of this place go into; None where it is read as it lies."""
        if self.cache_dir or "://" in where:
            return Cache.of(self.cache_dir, self.cache_dir_gb)
        return None

"""Seeds of training, far from those of evaluation, demonstrations and other runs."""

MAX_SEED = 20_000  # keeps environment seeds below 2^31
SEEDS_PER_RUN = 100_000


def training_seed(seed: int) -> int:
    """First environment seed of the run ``seed``."""
    return 100_000_000 + seed * SEEDS_PER_RUN

"""What an estimator receives besides the rollout."""

from dataclasses import dataclass

from agrpo_megatron.config.settings import AlgorithmSettings


@dataclass(frozen=True)
class DrawContext:
    """The inputs of an estimator besides the rollout; `algorithm` has no null left to fill."""

    algorithm: AlgorithmSettings
    eos_id: int | None
    seed: int

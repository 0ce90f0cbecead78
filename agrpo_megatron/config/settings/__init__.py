"""Every setting of a run, section by section.

`agrpo config` prints them as a reference. Importing them loads neither torch nor Megatron.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from agrpo_megatron.config.schema import build, from_text, section, setting
from agrpo_megatron.config.settings.algorithm import PROPOSALS as PROPOSALS
from agrpo_megatron.config.settings.algorithm import STEP_SAMPLERS as STEP_SAMPLERS
from agrpo_megatron.config.settings.algorithm import AlgorithmSettings
from agrpo_megatron.config.settings.lora import LoraSettings as LoraSettings
from agrpo_megatron.config.settings.model import (
    ModelSettings,
    ParallelSettings,
    RolloutSettings,
    RunSettings,
    TokenizerSettings,
)
from agrpo_megatron.config.settings.moe import MoeSettings as MoeSettings
from agrpo_megatron.config.settings.precision import PRECISIONS, Fp8Settings, KernelSettings
from agrpo_megatron.config.settings.profile import ProfileSettings as ProfileSettings
from agrpo_megatron.config.settings.resilience import LaunchSettings, ResilienceSettings
from agrpo_megatron.config.settings.sampling import MODEL_FREE as MODEL_FREE
from agrpo_megatron.config.settings.sampling import UNMASKING as UNMASKING
from agrpo_megatron.config.settings.sampling import SamplingSettings
from agrpo_megatron.config.settings.supervised import SftSettings
from agrpo_megatron.config.settings.training import (
    CheckpointSettings,
    EvaluationSettings,
    LoggingSettings,
    OptimizerSettings,
    TaskSettings,
    TrainSettings,
)


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    run: RunSettings = section(RunSettings, "run directory, seed and timeouts")
    precision: str = setting(
        "fp32",
        "weights and activations; bf16 keeps fp32 main weights, fp8 is bf16 with the layers' "
        "matrix products in FP8",
        choices=PRECISIONS,
    )
    fp8: Fp8Settings = section(Fp8Settings, "precision=fp8")
    kernels: KernelSettings = section(KernelSettings, "kernel choices")
    model: ModelSettings = section(ModelSettings, "the transformer")
    tokenizer: TokenizerSettings = section(TokenizerSettings, "text to ids")
    parallel: ParallelSettings = section(ParallelSettings, "layout of the ranks")
    rollout: RolloutSettings = section(RolloutSettings, "rollouts under a pipeline")
    task: TaskSettings = section(TaskSettings, "problems and reward")
    lora: LoraSettings = section(LoraSettings, "low-rank adapters in place of all weights")
    sft: SftSettings = section(SftSettings, "supervised phase")
    sampling: SamplingSettings = section(SamplingSettings, "rollout sampler")
    algorithm: AlgorithmSettings = section(AlgorithmSettings, "policy gradient")
    optimizer: OptimizerSettings = section(OptimizerSettings, "optimizer of the RL phase")
    ddp: dict[str, Any] = setting({}, "passed to Megatron's DistributedDataParallelConfig by name")
    train: TrainSettings = section(TrainSettings, "RL loop")
    evaluation: EvaluationSettings = section(EvaluationSettings, "held-out evaluation")
    checkpoint: CheckpointSettings = section(CheckpointSettings, "checkpoints")
    logging: LoggingSettings = section(LoggingSettings, "reports")
    profile: ProfileSettings = section(ProfileSettings, "operators of some iterations")
    resilience: ResilienceSettings = section(ResilienceSettings, "failures, preemption and alarms")
    launch: LaunchSettings = section(LaunchSettings, "the job that `agrpo launch` submits")

    @cached_property
    def rollout_layout(self) -> ParallelSettings:
        """The layout of the rollouts: `rollout.parallel`, or the training layout if null.

        Raises:
            ValueError: the text is not a layout.
        """
        text, key = self.rollout.parallel, "rollout.parallel"
        if text is None:
            return self.parallel
        parts = from_text(ParallelSettings, text, key=key)
        return build(ParallelSettings, parts, f"{key}.")

    @property
    def has_patterns(self) -> bool:
        """Whether some tokens of a packed row do not see all of it."""
        return self.model.has_blocks or self.sampling.is_cached or self.sft.has_schedule

    def caches_keys(self, sampling: SamplingSettings) -> bool:
        """Return whether a sampler keeps keys and values: of a block model, or by its policy."""
        is_block_model = self.model.has_blocks and self.rollout.cached is not False
        return is_block_model or sampling.is_cached

    @cached_property
    def evaluation_sampling(self) -> SamplingSettings:
        """The sampler of evaluation: `sampling` with the overrides of `evaluation`.

        It draws no positions, and records nothing that only an update needs. An approximate sampler
        stands in for the exact policy, so that one is evaluated.
        """
        sampling, chosen = self.sampling, self.evaluation
        return replace(
            sampling,
            policy="exact" if sampling.policy == "approximate" else sampling.policy,
            temperature=chosen.temperature,
            unmasking=chosen.unmasking,
            denoising_steps=chosen.denoising_steps or sampling.denoising_steps,
            block_length=chosen.block_length or sampling.block_length,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            position_temperature=None,
            record_drawn=False,
        )

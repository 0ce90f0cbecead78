"""Settings of failures, preemption and alarms, and of SLURM jobs."""

from dataclasses import dataclass
from typing import Any

from agrpo_megatron.config.schema import setting

# The sections of a run, which have a time limit each.
SECTIONS: tuple[str, ...] = ("setup", "rollout", "reward", "update", "checkpoint", "evaluation")


@dataclass(frozen=True)
class ResilienceSettings:
    """Hangs, preemption, updates that are not finite, and alarms."""

    watchdog: str = setting(
        "auto",
        "what detects a hung rank: ft_launcher if it starts the ranks, else the built-in watchdog",
        choices=("auto", "never"),
    )
    first_timeout: float = setting(
        1800.0, "limit of a section before one is learned", unit="seconds", low=0.1
    )
    least_timeout: float = setting(60.0, "shortest learned limit", unit="seconds", low=0.1)
    timeout_factor: float = setting(
        5.0, "learned limit / longest time of a section", low=1, high=1000
    )
    timeouts: dict[str, Any] = setting(
        {}, "fixed limits of sections by name, in seconds; see docs/reliability"
    )
    stop_margin: float | None = setting(
        None,
        "stop this long before the job's time limit; null: 1.5 x longest reward, update and save",
        unit="seconds",
        low=0,
    )
    idle_attempts: int = setting(
        2, "attempts in a row without progress after which a job is not queued again", low=1
    )
    skip_updates: int = setting(
        0, "consecutive updates that may be skipped for a NaN or infinite loss or gradient", low=0
    )
    roll_backs: int = setting(0, "rollbacks to the last good checkpoint after such updates", low=0)
    entropy_alarm: float = setting(
        0.0, "warn when a rollout's mean entropy is under this; 0: never", unit="nats", low=0
    )
    entropy_rise_alarm: float = setting(
        2.0,
        "warn when a rollout's mean entropy is this many times that of the first 10 iterations, "
        "and over a tenth of its maximum; 0: never",
        low=0,
    )
    empty_alarm: float = setting(
        0.5, "warn when this share of completions is only end-of-text; 0: never", low=0, high=1
    )
    failed_rewards_alarm: float = setting(
        0.1, "warn when this share of rewards failed; 0: never", low=0, high=1
    )
    zero_variance_alarm: float = setting(
        1.0, "warn when this share of rollouts has no advantage; 0: never", low=0, high=1
    )


@dataclass(frozen=True)
class LaunchSettings:
    """The SLURM job that `agrpo launch` submits; null leaves a choice to the cluster."""

    partition: str | None = setting(None, "SLURM partition")
    account: str | None = setting(None, "SLURM account")
    qos: str | None = setting(None, "SLURM quality of service")
    time: str | int | None = setting(
        None, "time limit as SLURM writes it: 04:00:00, 1-12 (days-hours), or minutes"
    )
    grace: int = setting(
        300, "SLURM signals the job this long before its limit", unit="seconds", low=0, high=65535
    )
    gpus_per_node: int = setting(8, "GPUs of each node; 0 runs on CPUs", low=0, high=1024)
    ranks_per_node: int | None = setting(
        None, "ranks per node; null: 1 per GPU, 1 on CPUs", low=1, high=1024
    )
    gpu_memory: float = setting(80.0, "memory of each GPU, for the estimate", unit="GiB", low=1)
    cpus_per_task: int | None = setting(None, "CPUs of each node's task; null: all", low=1)
    exclude: str | None = setting(None, "nodes to exclude, as SLURM writes them")
    launcher: str = setting(
        "auto",
        "starts the ranks of a node; auto: ft_launcher if it is installed",
        choices=("auto", "torchrun", "ft_launcher"),
    )
    restarts: int = setting(3, "most restarts of the ranks in a job", low=0)
    options: list[str] | None = setting(None, "further options of sbatch, such as --reservation=x")

"""Metrics of what a model learns: rewards, completions and their sampling."""

from agrpo_megatron.runs.metrics.record import EVAL, GRADED, RL, Metric

REWARDS = (
    Metric(
        "reward/mean",
        GRADED,
        "Mean score. In RL it is over all completions of the iteration, those of replaced groups "
        "included; in an evaluation over the held-out problems.",
        healthy="Rises. If it is flat, look at `zero_advantage_fraction` and `failed_rewards`.",
    ),
    Metric(
        "reward/std",
        GRADED,
        "Standard deviation of the scores over the same completions.",
        healthy="Above 0: equal scores have no advantage.",
    ),
    Metric("reward/<label>/mean", GRADED, "Mean score of one task of a mixture, by its label."),
    Metric("reward/<part>", GRADED, "Mean of a named part of the reward (`Reward.parts`)."),
    Metric(
        "failed_rewards",
        GRADED,
        "Completions whose reward raised, hung or returned no reward. Each is scored "
        "`task.grader.failed_score`.",
        healthy="0. A warning names the reasons.",
    ),
    Metric(
        "failed_rewards_fraction",
        GRADED,
        "Share of completions whose reward failed.",
        healthy="0. From `resilience.failed_rewards_alarm` on an alarm is on.",
    ),
    Metric(
        "accuracy",
        GRADED,
        "Share of completions that are correct. In RL it is of sampled completions of training "
        "problems; in an evaluation of held-out problems, sampled at `evaluation.temperature`.",
        healthy="Rises, in evaluations too.",
    ),
    Metric(
        "pass_at_group",
        RL,
        "Share of groups with at least one correct completion: pass@k for k = "
        "`algorithm.group_size`, on training problems.",
        healthy="Above `accuracy`; where both are equal, groups are all right or all wrong.",
    ),
    Metric("accuracy/<label>", GRADED, "Accuracy on one task of a mixture, by its label."),
    Metric(
        "accuracy_low", EVAL, "Lower end of the 95 % interval of `accuracy`, over the problems."
    ),
    Metric(
        "accuracy_high", EVAL, "Upper end of the 95 % interval of `accuracy`, over the problems."
    ),
    Metric(
        "summary/<name>",
        EVAL,
        "A figure of the task's own (`Task.summary`), such as the two averages of Sudoku's cells.",
    ),
)

SAMPLER = (
    Metric(
        "entropy",
        RL,
        "Mean entropy of the distributions that the tokens were drawn from.",
        unit="nats per token",
        healthy="Falls slowly. Near 0 the policy has collapsed; a steep rise means noise.",
    ),
    Metric(
        "by_step/entropy",
        RL,
        "`entropy` by denoising step: a list over equal parts of each completion's own steps, "
        "first to last; at most eight, one for each step if there are fewer. wandb and TensorBoard "
        "get `by_step/entropy/0`, ...",
        unit="nats per token",
        healthy="Falls from part to part: later steps see more text.",
    ),
    Metric(
        "live_steps/mean",
        RL,
        "Denoising steps of a completion that an update may score, on average.",
        unit="steps",
    ),
    Metric(
        "completions/mean_length",
        RL,
        "Tokens of a completion before its first end-of-text token, on average.",
        unit="tokens",
        healthy="Below `sampling.completion_length`; at it, answers may be cut off.",
    ),
    Metric(
        "completions/empty_fraction",
        RL,
        "Share of completions that begin with end-of-text.",
        healthy="Near 0.",
    ),
    Metric("completions/min_length", RL, "The same of the shortest completion.", unit="tokens"),
    Metric("completions/max_length", RL, "The same of the longest completion.", unit="tokens"),
    Metric(
        "completions/truncated_fraction",
        RL,
        "Share of completions without a stop token: they fill `sampling.completion_length`.",
        healthy="Near 0, where answers have an end.",
    ),
    Metric("advantage/min", RL, "Lowest advantage of a completion."),
    Metric("advantage/max", RL, "Highest advantage of a completion."),
    Metric(
        "zero_advantage_fraction",
        RL,
        "Share of rollouts whose advantage is 0, mostly because all completions of their group "
        "earned the same reward. They have no gradient.",
        healthy="Below 1. At 1 an update changes nothing.",
    ),
    Metric(
        "rollout/rounds",
        RL,
        "Further rounds, which sample new groups in place of groups of equal rewards; with "
        "`algorithm.resample_rounds`.",
    ),
    Metric("rollout/resampled_groups", RL, "Groups that the further rounds sampled."),
    Metric(
        "rollout/replayed",
        RL,
        "Completions that were read from another run; with `train.from_rollouts`.",
    ),
    Metric(
        "rollout/staleness",
        RL,
        "Updates between the weights that sampled the rollouts and those that the iteration "
        "begins with; with `train.async_steps`.",
        unit="updates",
        healthy="`algorithm.updates_per_iteration`; 0 in the first iteration of a run.",
    ),
    Metric(
        "rollout/packing_efficiency",
        RL,
        "Tokens of the rollout's forward passes over those that they may hold "
        "(`train.token_budget`). Completions from an earlier attempt are left out.",
        healthy="Near 1; less where few rows are left, or all fit into one forward.",
    ),
    Metric(
        "rollout/bubble",
        RL,
        "Share of the pipeline's slots in which a stage waited during sampling; with pipeline "
        "parallelism.",
        healthy="A few percent; larger batches of prompts reduce it.",
    ),
)

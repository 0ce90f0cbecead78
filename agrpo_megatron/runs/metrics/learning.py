"""Metrics of what a model learns: rewards, completions, loss and policy."""

from agrpo_megatron.runs.metrics.record import EVAL, GRADED, RL, SFT, UPDATED, Metric

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
        "rollout/bubble",
        RL,
        "Share of the pipeline's slots in which a stage waited during sampling; with pipeline "
        "parallelism.",
        healthy="A few percent; larger batches of prompts reduce it.",
    ),
)

POLICY = (
    Metric(
        "loss",
        SFT,
        "Masked-diffusion cross-entropy, weighted as `sft` sets it, or with `sft.loss=vrpo` the "
        "loss of preference pairs: mean over the batch.",
        unit="nats",
        healthy="Falls, noisily: each example has its own number of masks.",
    ),
    Metric(
        "loss",
        RL,
        "The loss whose gradient the update takes: mean over rollouts, and over updates.",
        healthy="About 0, by construction: in the first update all ratios are 1, so the policy "
        "loss is minus the mean weighted advantage, and the advantages of a group sum to 0. Its "
        "gradient is not 0. Judge a run by rewards, not by this.",
    ),
    Metric(
        "loss/<name>", RL, "A metric of your own loss function (`algorithm.loss=FILE.py:NAME`)."
    ),
    Metric(
        "grad_norm",
        UPDATED,
        "Norm of the gradient before clipping; of several updates the largest.",
        healthy="Stable.",
    ),
    Metric("learning_rate", UPDATED, "Learning rate of the last update."),
    Metric(
        "held_out_loss",
        SFT,
        "Supervised loss of the held-out rows, always under the same masks; with `sft.eval_data` "
        "or `sft.eval_fraction`.",
        unit="nats per token",
        healthy="Falls. When it rises while `loss` falls, the rows are learned by heart.",
    ),
    Metric("scored_tokens", SFT, "Masked tokens of the batch that the loss scores.", unit="tokens"),
    Metric(
        "ratio/mean",
        RL,
        "Mean policy ratio of the scored tokens: their probability now over that in the rollout.",
        healthy="1 in a first update; near 1 with several updates an iteration.",
    ),
    Metric(
        "ratio/max_error",
        RL,
        "Largest distance of a policy ratio from 1 in the first update, where the weights are "
        "still those that sampled. It measures how far rollout and training disagree.",
        healthy="0 in fp32 on one rank, below 1e-5 on several; always below `train.ratio_alarm`.",
    ),
    Metric(
        "ratio/p99_error",
        RL,
        "The same distance that 99 % of the tokens do not exceed; less noisy than the largest.",
    ),
    Metric(
        "clip_fraction",
        RL,
        "Share of the scored tokens whose ratio the loss clips.",
        healthy="0 with one update an iteration.",
    ),
    Metric("clip_fraction/low", RL, "The part of `clip_fraction` with ratios below 1."),
    Metric("clip_fraction/high", RL, "The part of `clip_fraction` with ratios above 1."),
    Metric(
        "by_step/ratio_error",
        RL,
        "`ratio/max_error` by denoising step, as `by_step/entropy`; none for a part without scored "
        "tokens. Losses whose ratio is of several tokens do not have it.",
        healthy="As `ratio/max_error`, equal in all parts.",
    ),
    Metric(
        "weights/effective_share",
        RL,
        "Effective sample size of the scored rows' weights over their number: "
        "(sum w)^2 / (n sum w^2), mean over updates.",
        healthy="1 for equal weights. Far below, few draws dominate a gradient.",
    ),
    Metric(
        "kl",
        RL,
        "Mean estimate of the KL divergence from the reference policy; 0 without one "
        "(`algorithm.kl_coefficient: 0`).",
        unit="nats per token",
    ),
    Metric(
        "experts/changed",
        RL,
        "Share of the rollout's choices of experts that the routers of the first update make "
        "otherwise; with `algorithm.rollout_experts`.",
        healthy="Near 0; with replay the rollout's choices are used all the same.",
    ),
    Metric(
        "skipped_updates",
        UPDATED,
        "Updates left out because the loss or the gradient was not finite.",
        healthy="0. Rollouts that caused one are named in `nonfinite.jsonl`.",
    ),
)

PREFERENCES = (
    Metric(
        "preference/accuracy",
        SFT,
        "Share of pairs with a margin above 0.",
        healthy="Rises from 0: before the first update the policy is the reference, and every "
        "margin is 0.",
    ),
    Metric(
        "preference/margin",
        SFT,
        "Mean reward of the chosen text less that of the rejected one, before the update.",
        healthy="Rises.",
    ),
    Metric(
        "preference/margin_variance",
        SFT,
        "Variance of a margin by its masks, estimated from their spread within the update; with "
        "`sft.preferences.states=counts` an upper bound.",
        healthy="Small against the square of the margin; more `sft.preferences.masks` lower it.",
    ),
    Metric(
        "preference/chosen_reward",
        SFT,
        "`sft.preferences.beta` times the gain of the chosen text's ELBO over the reference's.",
        healthy="Above 0. If it falls, both texts become less likely: raise "
        "`sft.preferences.chosen_weight`, or lower the learning rate.",
    ),
    Metric("preference/rejected_reward", SFT, "The same of the rejected text."),
    Metric(
        "elbo/chosen",
        SFT,
        "Mean estimate of the chosen text's log-likelihood (evidence lower bound).",
        unit="nats",
        healthy="Does not fall.",
    ),
    Metric("elbo/rejected", SFT, "The same of the rejected text.", unit="nats"),
    Metric(
        "elbo/variance",
        SFT,
        "Variance of an ELBO by its masks, as `preference/margin_variance`.",
        unit="nats squared",
    ),
    Metric(
        "held_out_<metric>",
        SFT,
        "A metric of pairs, of the held-out ones, under the same masks each time.",
    ),
)

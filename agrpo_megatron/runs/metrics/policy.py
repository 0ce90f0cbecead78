"""Metrics of losses and of the policy that they change."""

from agrpo_megatron.runs.metrics.record import RL, SFT, UPDATED, Metric

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
    Metric(
        "attention/ahead",
        SFT,
        "Share of the tokens after its own that a token sees, with `sft.anneal_iterations`.",
    ),
    Metric(
        "attention/block_length",
        SFT,
        "Block length of the iteration, with `sft.block_schedule`; 0: the whole row.",
        unit="tokens",
    ),
    Metric("scored_tokens", SFT, "Masked tokens of the batch that the loss scores.", unit="tokens"),
    Metric(
        "ratio/mean",
        RL,
        "Mean policy ratio of the scored tokens: their probability now over that in the rollout; "
        "with `algorithm.rollout_correction`, over that before the iteration's first update.",
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
        "correction/mean",
        RL,
        "Mean importance weight of the scored tokens before truncation: their probability under "
        "the weights that the iteration begins with, over that in the rollout; with "
        "`algorithm.rollout_correction`. Tokens that share a ratio (`algorithm.level`) share a "
        "weight.",
        healthy="Near 1.",
    ),
    Metric(
        "correction/truncated",
        RL,
        "Share of the scored tokens whose importance weight exceeds "
        "`algorithm.rollout_correction`, and is truncated to it.",
        healthy="Below 0.01; else the rollouts are too old, or of another policy.",
    ),
    Metric(
        "mismatch/mean",
        RL,
        "Mean of exp |difference| of scored tokens' log-probs between the trained policy and the "
        "sampler, before the update; with `algorithm.rollout_correction`.",
        healthy="1 for the same policy; below 1.05, `train.mismatch_alarm`.",
    ),
    Metric(
        "mismatch/p99",
        RL,
        "The same that 99 % of the tokens do not exceed.",
        healthy="Below 1.5, `train.mismatch_tail_alarm`.",
    ),
    Metric("mismatch/max", RL, "The same at its largest."),
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

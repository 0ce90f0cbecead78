"""Metrics of the work: rows, FLOPs, time, ranks, alarms, and the choice of draws."""

from agrpo_megatron.runs.metrics.record import EVAL, RL, SFT, UPDATED, Metric

WORK = (
    Metric(
        "rows",
        RL,
        "Rows scored with gradient: each is one state (one drawn step) of one rollout. It is at "
        "most rollouts x `algorithm.mc_samples` x updates; rollouts without advantage have none.",
    ),
    Metric(
        "scoring_rows",
        RL,
        "Rows scored without gradient, for older log-probabilities, a reference or a joint loss.",
    ),
    Metric("micro_batches", RL, "Micro-batches of each data-parallel rank, over all updates."),
    Metric(
        "perf/packing_efficiency",
        RL,
        "Tokens of the rows over the tokens that their micro-batches may hold "
        "(`train.token_budget`).",
        healthy="Near 1; a larger token budget raises it.",
    ),
    Metric(
        "update/bubble",
        RL,
        "Share of the pipeline's slots in which a stage waits during the updates, by the schedule "
        "and its number of micro-batches; with pipeline parallelism.",
        healthy="A few percent; more micro-batches or virtual stages reduce it.",
    ),
    Metric(
        "flops",
        RL,
        "FLOPs of the iteration: rollouts, updates and measurements. Under `train.async_steps: 1` "
        "these are the rollouts that `timing/rollout` names.",
        "FLOP",
    ),
    Metric("update_flops", RL, "FLOPs of the updates alone, part of `flops`.", "FLOP"),
)

DRAWS = (
    Metric(
        "mc_samples",
        RL,
        "Draws per rollout of this iteration's updates; with `algorithm.mc_samples: auto`.",
    ),
    Metric(
        "auto/draw_noise",
        RL,
        "Variance of the gradient by these draws over its variance by completions.",
        healthy="Below 1: more draws would hardly help.",
    ),
    Metric("auto/share", RL, "Work of all measurements over the work of all iterations, so far."),
    Metric(
        "auto/draw_noise/<draws>", RL, "`auto/draw_noise` of a candidate, where it is measured."
    ),
    Metric(
        "auto/signal/<draws>",
        RL,
        "A candidate's signal for the work, over that of the chosen number.",
    ),
    Metric(
        "measuring_rows",
        RL,
        "Rows scored with gradient in order to measure; `rows` does not count them.",
        healthy="0 in most iterations.",
    ),
    Metric("measuring_flops", RL, "FLOPs of the measurement, part of `flops`.", "FLOP"),
)

TIME = (
    Metric("timing/iteration", UPDATED, "The whole iteration, without evaluation and saving.", "s"),
    Metric(
        "timing/rollout",
        RL,
        "Sampling, with the rewards that are graded meanwhile. Under `train.async_steps: 1` these "
        "are the rollouts of the next iteration; the first iteration samples its own, too.",
        "s",
    ),
    Metric("timing/reward", RL, "The wait for rewards after sampling, and their exchange.", "s"),
    Metric("timing/reward_hidden", RL, "Grading during other work; it costs no time.", "s"),
    Metric("timing/update", RL, "The updates: forward, backward, optimizer.", "s"),
    Metric("timing/measure", RL, "A measurement of the draws; not part of `timing/update`.", "s"),
    Metric(
        "timing/cpu",
        RL,
        "CPU time of the main rank's process; above `timing/iteration` where "
        "several threads compute.",
        "s",
    ),
    Metric("timing/evaluation", EVAL, "Sampling and grading all held-out problems.", "s"),
    Metric("timing/evaluation", SFT, "The loss of the held-out rows, where it is measured.", "s"),
)

SPEED = (
    Metric(
        "perf/tokens_per_second",
        UPDATED,
        "Tokens that ran through the model in the iteration, on all ranks, over its time. In RL "
        "each denoising step counts its tokens.",
        unit="tokens/s",
    ),
    Metric(
        "perf/unmasked_per_second",
        RL,
        "Tokens that denoising steps of the rollout fixed, on all ranks, over its time; the filled "
        "ends of texts that were over are none of them. An iteration that takes completions from "
        "an earlier attempt shows more.",
        unit="tokens/s",
    ),
    Metric(
        "perf/mfu_<part>",
        RL,
        "Model FLOPs utilisation of the rollout and of the update: counted FLOPs over time, ranks "
        "and the peak rate of the device. Activations that are recomputed do not count. The run's "
        "notes name the rate: published for a GPU, measured for a CPU. An iteration that "
        "takes completions from an earlier attempt shows more.",
        healthy="0.3 to 0.5 in updates of a large model on a GPU.",
    ),
)

MEMORY = (
    Metric(
        "memory/allocated_peak",
        UPDATED,
        "Most GPU memory that tensors took in the iteration, on the rank that took most.",
        "GiB",
    ),
    Metric(
        "memory/reserved_peak",
        UPDATED,
        "Most GPU memory that torch reserved in the iteration, likewise.",
        "GiB",
        healthy="Below the GPU's memory; far above the allocated peak, it is fragmented.",
    ),
    Metric(
        "memory/host_peak",
        UPDATED,
        "Most resident memory of a rank's process since it started, without its workers.",
        "GiB",
    ),
)

RANKS = (
    Metric("section/<name>", UPDATED, "Time of the slowest rank in a section of the work.", "s"),
    Metric(
        "straggler/<name>",
        UPDATED,
        "Time of the slowest rank over the median of the ranks.",
        healthy="1; a warning names a rank above 1.5 five times in a row.",
    ),
    Metric("straggler/<name>_rank", UPDATED, "The slowest rank."),
)

ALARMS = (
    Metric(
        "alarm/<name>",
        RL,
        "1 while an alarm is on: ratio, mismatch, mismatch_tail, empty, entropy, entropy_rise, "
        "failed_rewards or zero_variance; each has a level in the settings (`train.*_alarm`, "
        "`resilience.*_alarm`).",
        healthy="0",
    ),
)

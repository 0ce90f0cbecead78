"""Metrics of how far a run is: phase, iteration, epoch, and sums so far."""

from agrpo_megatron.runs.metrics.record import ALL, EVAL, RL, SFT, Metric

POSITION = (
    Metric("phase", ALL, "sft, rl or eval: what the line reports."),
    Metric(
        "iteration",
        ALL,
        "Finished iterations of the phase. An evaluation has that of the RL iteration it follows; "
        "0 is before the first one.",
    ),
    Metric(
        "epoch",
        SFT,
        "Passes over the data, of a mixture over all of its rows.",
        unit="epochs",
    ),
    Metric("stage", EVAL, "When the evaluation ran: before, interval or after training with RL."),
    Metric("problems", EVAL, "Held-out problems, one completion each."),
    Metric(
        "epoch",
        RL,
        "Passes over the training problems so far; of a mixture, the mean over the problems of all "
        "its tasks. Rounds of `algorithm.resample_rounds` that were not needed count, as their "
        "problems are passed over.",
    ),
    Metric("totals/completions", RL, "Completions so far, those of replaced groups included."),
    Metric(
        "totals/tokens",
        SFT + RL,
        "Tokens of the texts of these completions: up to the first stop token, without prompts. In "
        "the supervised phase all tokens of its rows so far, prompts and padding included.",
        "tokens",
    ),
    Metric("totals/flops", RL, "Sum of `flops` so far; `train.flops` limits it.", "FLOP"),
    Metric(
        "totals/seconds",
        ALL,
        "Wall-clock time of all attempts so far: of earlier ones up to their last line, work that "
        "was lost and repeated included; waits between attempts are not.",
        "s",
    ),
)

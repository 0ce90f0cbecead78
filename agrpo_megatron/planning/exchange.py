"""What the ranks of a replica send each other, and its seconds."""

from dataclasses import dataclass

from agrpo_megatron.config.settings import ParallelSettings, Settings
from agrpo_megatron.planning.cluster import Cluster
from agrpo_megatron.planning.fit import Work
from agrpo_megatron.scaling.memory import BFLOAT16, FLOAT32


@dataclass(frozen=True)
class Exchange:
    """What a rank sends in a pass."""

    messages: float = 0.0  # collectives, and sends to another stage
    sent: float = 0.0  # bytes
    seconds: float = 0.0  # by the links' rates

    @property
    def work(self) -> Work:
        """Return what is sent as work of its own."""
        return Work(0.0, messages=self.messages, sent=self.sent)

    def plus(self, messages: float, sent: float, *, link: float, latency: float) -> "Exchange":
        """Return the exchange with more messages of so many bytes in all."""
        took = sent / link + messages * latency
        return Exchange(self.messages + messages, self.sent + sent, self.seconds + took)


def width(settings: Settings) -> int:
    """Return the bytes of an activation."""
    return FLOAT32 if settings.precision == "fp32" else BFLOAT16


def exchange(
    settings: Settings,
    layout: ParallelSettings,
    cluster: Cluster,
    tokens: float,
    *,
    scored: float,
    directions: int,
) -> Exchange:
    """Return what a stage's ranks exchange of activations in a pass.

    In each direction and layer, tensor parallelism sums twice the residual stream (`_sums`); a sum
    is a reduce-scatter and an all-gather, also with sequence parallelism, which gathers once more
    in the backward pass. Experts receive and return each token `moe.topk` times. A pipeline sends
    the residual stream once for each virtual stage. Context parallelism gathers the keys and values
    of a row that crosses parts: at most all of them.

    Args:
        tokens: of a replica.
        scored: tokens of them that the head scores.
    """
    model, size, latency = settings.model, width(settings), cluster.latency
    tensor, expert, context = layout.tensor, layout.expert, layout.context
    mine = tokens / context
    layers = model.num_layers / layout.pipeline
    token = model.hidden_size * size
    total = Exchange()
    if tensor > 1:
        link = cluster.link(size=tensor, stride=1)
        whole, short = _sums(settings, layout, directions=directions)
        streams = 2 * (whole * mine + short * scored / context)
        streams += 2 * layers * mine if layout.sequence and directions > 1 else 0
        sent = (tensor - 1) / tensor * streams * token
        total = total.plus(whole + short, sent, link=link, latency=latency)
    if context > 1:
        link = cluster.link(size=context, stride=tensor)
        keys = 2 * tokens * model.key_width / tensor * size
        gathered = layers * directions * (context - 1) / context * keys
        total = total.plus(layers * directions, gathered, link=link, latency=latency)
    if expert > 1 and model.moe.experts:
        link = cluster.scatter(size=expert, stride=layout.expert_tensor)
        share = mine / (tensor if layout.sequence else 1) * layout.expert_tensor
        copies = share * model.moe.topk * token
        routed = 2 * directions * model.moe_layers / layout.pipeline
        sent = routed * (expert - 1) / expert * copies
        total = total.plus(routed, sent, link=link, latency=latency)
    if layout.pipeline > 1:
        stride = cluster.ranks // layout.pipeline
        link = cluster.link(size=layout.pipeline, stride=stride)
        count = directions * layout.virtual
        sent = count * mine * token / (tensor if layout.sequence else 1)
        total = total.plus(count, sent, link=link, latency=latency)
    return total


def _sums(settings: Settings, layout: ParallelSettings, *, directions: int) -> tuple[float, float]:
    """Return the sums of tensor parallelism in a stage: of all tokens, and of scored ones only.

    Two in each layer and direction, one of the embedding, and one of the gradient of the head's
    inputs. Where the last layer ends at scored tokens, its sums are of these, apart from that of
    the gradient of its attention's inputs.
    """
    backward = min(1, directions - 1)
    ends = settings.model.ends_at_scored and not layout.sequence
    last = (2 * directions - backward) * ends
    whole = 2 * settings.model.num_layers * directions + 1 - last
    return whole / layout.pipeline, (last + backward) / layout.pipeline

"""Programs of the real sampler: what each stage of a pipeline asks torch.distributed for.

Every stage runs in a thread, over messages that never wait.
"""

import contextlib
import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.logprobs import Vocabulary
from agrpo_megatron.diffusion.sampler import SamplerContext, SamplerHooks, SamplingStopped, sample
from agrpo_megatron.megatron import platform
from agrpo_megatron.megatron.layers.config import transformer_config
from agrpo_megatron.megatron.network import Network
from agrpo_megatron.megatron.parallel import Axis, Ranks
from agrpo_megatron.megatron.pipeline import make_forward
from agrpo_megatron.resilience.stop import NoStop, Turns
from tests.megatron.one_queue import Part, Step

PATIENCE = 60.0  # seconds for a message that a thread expects
VOCABULARY, END, MASK = 8, 6, 7  # few tokens: some rows end early


class Group:
    """A process group of all ranks; which of them asks, its thread says."""

    def __init__(self, world: "Recording", name: str):
        self.world, self.name = world, name

    def rank(self) -> int:
        return self.world.rank

    def size(self) -> int:
        return self.world.size


class Alone:
    """A process group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class Recording:
    """Stands in for torch.distributed between threads; notes what each of them asks for."""

    def __init__(self, size: int):
        self.size = size
        self.programs: list[list[Step]] = [[] for _ in range(size)]
        self.pipeline, self.replica = Group(self, "pipeline"), Group(self, "replica")
        self._thread = threading.local()
        self._mail: defaultdict[Any, queue.Queue[Tensor]] = defaultdict(queue.Queue)

    @property
    def rank(self) -> int:
        return self._thread.rank

    def run(self, program: Callable[[int], Any]) -> list[Any]:
        """Call `program(rank)` on every rank, in threads; returns what they return."""

        def call(rank: int) -> Any:
            self._thread.rank = rank
            with platform._CpuForCuda():  # it holds for one thread
                return program(rank)

        for name in ("isend", "irecv", "send", "recv", "batch_isend_irecv", "all_reduce"):
            setattr(dist, name, getattr(self, name))
        dist.P2POp = self.Operation  # type: ignore[misc,assignment]
        dist.get_process_group_ranks = lambda _: list(range(self.size))  # type: ignore[assignment]
        dist.get_global_rank = lambda _, rank: rank  # type: ignore[assignment]
        dist.get_backend = lambda *_: "gloo"  # type: ignore[assignment]
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(call, range(self.size)))

    class Operation(NamedTuple):
        """One message of a group of them."""

        op: Callable[..., Any]
        tensor: Tensor
        peer: int
        group: Any = None

    class Work:
        """A message under way."""

        def __init__(self, *ends: Callable[[], Any]):
            self._ends = list(ends)

        def wait(self) -> None:
            while self._ends:
                self._ends.pop()()

    def _channel(self, group: Any) -> str:
        return group.name if isinstance(group, Group) else "world"

    def _note(self, kind: str, peer: int = -1, parts: tuple[Part, ...] = ()) -> None:
        self.programs[self.rank].append(Step(kind, peer, parts))

    def _begin(self, way: str, tensor: Tensor, peer: int, group: Any) -> Work:
        channel = self._channel(group)
        if way == "send":
            self._mail[self.rank, peer, channel].put(tensor.detach().clone())
            return self.Work()
        mail = self._mail[peer, self.rank, channel]
        return self.Work(lambda: tensor.data.copy_(mail.get(timeout=PATIENCE)))

    def _message(self, way: str, tensor: Tensor, peer: int, group: Any) -> Work:
        if group is self.replica:
            self._note("post" if way == "send" else "take", peer)
        else:
            part = Part(way, peer, self._channel(group), tensor.numel())
            self._note("exchange", parts=(part,))
        return self._begin(way, tensor, peer, group)

    def isend(self, tensor: Tensor, dst: int, group: Any = None) -> Work:
        return self._message("send", tensor, dst, group)

    def irecv(self, tensor: Tensor, src: int, group: Any = None) -> Work:
        return self._message("receive", tensor, src, group)

    def send(self, tensor: Tensor, dst: int, group: Any = None) -> None:
        self.isend(tensor, dst, group)

    def recv(self, tensor: Tensor, src: int, group: Any = None) -> None:
        self.irecv(tensor, src, group).wait()

    def batch_isend_irecv(self, operations: list[Operation]) -> list[Work]:
        ways = ["send" if each.op == self.isend else "receive" for each in operations]
        parts = [
            Part(way, each.peer, self._channel(each.group), each.tensor.numel())
            for way, each in zip(ways, operations, strict=True)
        ]
        self._note("exchange", parts=tuple(parts))
        return [
            self._begin(way, each.tensor, each.peer, each.group)
            for way, each in zip(ways, operations, strict=True)
        ]

    def all_reduce(self, _tensor: Tensor, _op: Any = None, group: Any = None, **_: Any) -> Any:
        if group is not self.replica:
            self._note("meet")
            return None
        self._note("vote")
        return self.Work(lambda: self._note("count"))


class Stage(nn.Module):
    """A virtual stage without weights: tokens are equally likely, but the shortest rows end."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: Any, *, shortest: int, is_first: bool, is_last: bool):
        super().__init__()
        self.config, self.shortest = config, shortest
        self.pre_process, self.post_process = is_first, is_last

    def set_input_tensor(self, hidden: Tensor | list[Tensor]) -> None:
        self.hidden = hidden[0] if isinstance(hidden, list) else hidden

    def set_is_first_microbatch(self) -> None:
        pass

    def forward(self, rows: Any) -> Tensor:
        shape = (len(rows.tokens), 1, self.config.hidden_size)
        if self.pre_process:
            self.hidden = torch.zeros(shape)
        assert self.hidden.shape == shape
        if not self.post_process:
            return self.hidden + 1
        logits = torch.zeros(len(rows.scored), VOCABULARY)
        owners = torch.bucketize(rows.scored, rows.cu_seqlens[1:], right=True)
        logits[:, END] = torch.where(rows.cu_seqlens.diff()[owners] == self.shortest, 99.0, 0.0)
        return logits


def record(
    settings: Settings, prompts: list[int], *, stop_at: int | None = None
) -> tuple[list[list[Step]], list[Any]]:
    """Run the sampler on all stages; returns their programs and what they sampled.

    For a process of its own: it replaces functions of torch.distributed and torch.cuda.

    Args:
        prompts: their lengths; a prompt of one token is answered by the end of text.
        stop_at: turn in which all stages are asked to stop.
    """
    platform.prepare_platform(threads=1)
    world = Recording(settings.parallel.pipeline)
    return world.programs, world.run(lambda _: _sampled(settings, world, prompts, stop_at))


def _sampled(settings: Settings, world: Recording, prompts: list[int], stop_at: int | None) -> Any:
    network = _network(settings, world)
    turns, seen = Turns(NoStop(), network.ranks), Counter[str]()

    def should_stop() -> bool:
        seen["turns"] += 1
        return turns.is_asked() or seen["turns"] == stop_at

    forward = make_forward(network, settings.rollout, sampling=settings.sampling)
    context = SamplerContext(
        forward, network.vocab, mask_id=MASK, eos_id=END, seed=0, token_budget=1 << 20
    )
    tokens = None
    with contextlib.suppress(SamplingStopped):
        tokens = sample(
            [torch.zeros(length, dtype=torch.int64) for length in prompts],
            torch.arange(len(prompts)),
            context=context,
            sampling=settings.sampling,
            hooks=SamplerHooks(should_stop=should_stop),
        ).tokens
    turns.close()
    return tokens


def _network(settings: Settings, world: Recording) -> Network:
    rank, one = world.rank, Axis(Alone(), 0, 1)  # type: ignore[arg-type]
    ranks = Ranks(
        rank=rank,
        world_size=world.size,
        device=torch.device("cpu"),
        parallel=settings.parallel,
        groups=ProcessGroupCollection(pp=world.pipeline, tp=Alone(), cp=Alone()),
        tensor=one,
        pipeline=Axis(world.pipeline, rank, world.size),  # type: ignore[arg-type]
        context=one,
        data=one,
        data_context=one,
        expert=one,
        expert_tensor=one,
        replica=world.replica,  # type: ignore[arg-type]
    )
    config = transformer_config(settings, settings.parallel, stage=rank)
    shortest = 1 + settings.sampling.completion_length
    last = world.size * settings.parallel.virtual - 1
    chunks = [
        Stage(config, shortest=shortest, is_first=number == 0, is_last=number == last)
        for number in range(rank, last + 1, world.size)
    ]
    vocab = Vocabulary(size=VOCABULARY, forbidden=(MASK,))
    return Network(tuple(chunks), ranks, vocab)  # type: ignore[arg-type]

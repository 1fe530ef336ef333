"""The sampler fed from the host: any number of prompts pass through its slots, and none waits on the devices.

`sampler.sample` has all prompts of a step on the devices. An evaluation has ten thousand, whose pixels no
memory holds; here a prompt's row is made in a thread shortly before it gets a slot, and what was said is
handed out as soon as its slot has ended. The rows of the next refill lie on the devices before the slots are
free, so that neither decoding nor reading of images waits for the other. Neighbours: `sampler` (the slots,
their queue), `evaluation/predict.py` (who asks).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fundus_jax import hosts, stop, training
from fundus_jax.data import round_up
from fundus_jax.grpo.rollout import Decoding, Settings, as_key, begin, start
from fundus_jax.grpo.sampler import STEPS, Queue, Split, decode_slots, make_stepper, put, sizes
from fundus_jax.models.batch import Batch
from fundus_jax.models.qwen2_5_vl.decode import Stepper, pinned

Array = jax.Array
Prepare = Callable[[int], Batch]  # the number of a prompt -> its row, a Batch [1,...] of numpy, static shapes


class Said(NamedTuple):
    """The rollouts of one prompt.

    Attributes:
        prompt: its number.
        tokens: [G] arrays of int32, with the end token where there is one.
        logprobs: [G] float, the sum over each rollout's tokens.
    """

    prompt: int
    tokens: list[np.ndarray]
    logprobs: list[float]


@dataclass(slots=True)
class Work:
    """What streams did, added up.

    Attributes:
        seconds: in all. busy: those in which the devices had something to do, as far as the host knows.
        waiting: those in which the host waited for rows.
        prompts: answered.
        steps: of all slots; told: those of them in which the slot had a rollout to continue.
    """

    seconds: float = 0.0
    busy: float = 0.0
    waiting: float = 0.0
    prompts: int = 0
    steps: int = 0
    told: int = 0

    def metrics(self) -> dict[str, float]:
        """What a report says of it: prompts a second, the share of the time in which the sampler was idle and
        in which the host waited for rows, and how full the slots were."""
        seconds = max(self.seconds, 1e-9)
        return {
            "seconds": self.seconds,
            "questions_per_second": self.prompts / seconds,
            "idle": 1 - self.busy / seconds,
            "waiting": self.waiting / seconds,
            "occupancy": self.told / self.steps if self.steps else 1.0,
        }


@contextmanager
def clock(work: Work) -> Iterator[None]:
    """Around what adds to `work`: counts its seconds."""
    began = time.perf_counter()
    try:
        yield
    finally:
        work.seconds += time.perf_counter() - began


class Feed:
    """The rows of prompts, made in threads in the order in which they are needed.

    Every shard of the batch has `per` prompts in a row as its own; this process makes the rows of the shards
    that it holds.
    """

    def __init__(
        self,
        prepare: Prepare,
        prompts: Sequence[int],
        shape: tuple[int, int],
        mesh: Mesh | None,
        threads: int,
    ) -> None:
        shards, self.refill = shape  # rows that a shard gets at a time
        self.prompts, self.mesh, self._prepare = prompts, mesh, prepare
        self.per = round_up(len(prompts), shards) // shards
        self.waiting = 0.0  # seconds in which there was no row
        mine = np.arange(shards) if mesh is None else training.rows_here(shards, mesh)
        self._mine: list[int] = mine.tolist()
        self._pool = ThreadPoolExecutor(threads)
        self._depth = 2 * self.refill + -(-threads // len(self._mine))  # of a shard: all threads have work
        self._coming: dict[tuple[int, int], Future[Batch]] = {}
        self._held: tuple[np.ndarray, Batch] | None = None  # the newest result, and what it is for
        self._blank: Batch | None = None

    def prompt(self, shard: int, place: int) -> int | None:
        """The number of a shard's prompt; None beyond its last."""
        at = shard * self.per + place
        return self.prompts[at] if place < self.per and at < len(self.prompts) else None

    def rows(self, given: np.ndarray) -> Batch:
        """The next rows of every shard, on the devices, [shards * refill, ...], after the `given` [shards]
        that were used; beyond a shard's last prompt a row is blank."""
        if self._held is None or not np.array_equal(self._held[0], given):
            began = time.perf_counter()
            self._go_on(given)
            rows = [
                self._row(shard, int(given[shard]) + k) for shard in self._mine for k in range(self.refill)
            ]
            self.waiting += time.perf_counter() - began
            batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
            placed = jax.device_put(batch) if self.mesh is None else training.place(batch, self.mesh)
            self._held = given.copy(), placed
        return self._held[1]

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # rows that were not begun are not made

    def _go_on(self, given: np.ndarray) -> None:
        """Begin the rows that are needed soon, and let go of those that were used."""
        self._coming = {key: row for key, row in self._coming.items() if key[1] >= given[key[0]]}
        for k in range(self._depth):
            for shard in self._mine:
                place = int(given[shard]) + k
                prompt = self.prompt(shard, place)
                if prompt is not None and (shard, place) not in self._coming:
                    self._coming[shard, place] = self._pool.submit(self._prepare, prompt)

    def _row(self, shard: int, place: int) -> Batch:
        coming = self._coming.get((shard, place))
        if coming is not None:
            return coming.result()
        blank = self._blank or jax.tree.map(np.zeros_like, self._prepare(self.prompts[0]))
        self._blank = blank
        return blank


def stream(
    model: Any,
    prepare: Prepare,
    prompts: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    group_size: int = 1,
    seed: int | Array = 0,
    slots: int = 0,
    refill: int = 0,
    threads: int = 2,
    mesh: Mesh | None = None,
    work: Work | None = None,
) -> Iterator[Said]:
    """What is said to each of `prompts`, in the order in which the slots end.

    A prompt's rollouts follow from the seed and its number alone, as those of `sampler.sample`: neither from
    S nor from who is asked beside it, so a part of the prompts can be asked later, or elsewhere. Under
    `mesh`, if there is one, every process calls this and gets everything.

    slots, refill: as for `sampler.sample`; on a mesh multiples of data x fsdp. threads: that make rows. work:
    gets what was done. Raises Stopped where the run is to stop, and ConfigError for settings that make no
    sense.
    """
    settings = Settings(max_new_tokens, float(temperature), group_size)
    settings.check()
    if not len(prompts):
        return
    work = Work() if work is None else work
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    rows = round_up(len(prompts), shards)
    slots, refill = sizes(rows, slots, refill)
    queue = Queue(rows, slots, refill)
    key, split = as_key(seed), nnx.split(model)
    stepper = make_stepper(split)
    feed = Feed(prepare, prompts, (len(queue.free), queue.refill), mesh, threads)
    holder = np.full(queue.free.shape, -1)
    with clock(work), feed, ThreadPoolExecutor(1) as watch:
        decoding = _open(split, stepper, feed.rows(queue.given), key, settings, slots)
        heard: list[Said] = []
        while not queue.over:
            while queue.waits:
                batch, first = feed.rows(queue.given), queue.given.copy()
                _, where = queue.take()
                numbers = _seat(feed, holder, first, where)
                decoding = _fill(split, stepper, decoding, batch, numbers, where, key, settings)
            began = time.perf_counter()
            decoding, ended = decode_slots(stepper, decoding, key, settings, queue.enough, STEPS)
            moment = watch.submit(_moment, ended)
            yield from heard  # and what is done with it, and the next rows, while the devices decode
            if (queue.given < queue.rows).any():
                feed.rows(queue.given)
            queue.free = np.array(stop.settle(ended)).reshape(queue.free.shape)
            work.busy += moment.result() - began
            heard = list(_heard(decoding, queue.free, holder))
            work.prompts += len(heard)
        yield from heard
        work.steps += slots * int(decoding.steps)
        work.told += int(decoding.busy)
    work.waiting += feed.waiting


def _moment(array: Array) -> float:
    """When the devices have computed `array`."""
    jax.block_until_ready(array)
    return time.perf_counter()


def _seat(feed: Feed, holder: np.ndarray, first: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The numbers [rows] of the prompts that get the slots `where` [shards, refill]; `holder` [shards, slots]
    notes who sits where, -1 for nobody."""
    numbers = np.zeros(where.shape, np.int32)
    for (shard, k), slot in np.ndenumerate(where):
        prompt = feed.prompt(shard, first[shard] + k)
        numbers[shard, k] = prompt or 0
        if slot < holder.shape[1]:
            holder[shard, slot] = -1 if prompt is None else prompt
    return numbers.reshape(-1)


def _heard(decoding: Decoding, ended: np.ndarray, holder: np.ndarray) -> Iterator[Said]:
    """What was said in the slots that have ended and hold somebody; they hold nobody afterwards."""
    places = np.argwhere(ended & (holder >= 0))
    if not len(places):  # decoding returned so that the run can be stopped
        return
    tokens, logprobs, mask = map(hosts.fetch, decoding.groups.out)
    for shard, slot in places:
        row = shard * holder.shape[1] + slot
        prompt, holder[shard, slot] = int(holder[shard, slot]), -1
        said = [tokens[row, g][mask[row, g]] for g in range(tokens.shape[1])]
        yield Said(prompt, said, [float(one) for one in logprobs[row].sum(axis=-1)])


@functools.partial(jax.jit, static_argnums=(4, 5))
def _open(
    model: Split, stepper: Stepper, batch: Batch, key: Array, settings: Settings, slots: int
) -> Decoding:
    """S slots that are free, for rows like those of `batch`."""
    number = jnp.arange(len(batch.tokens))
    made = jax.eval_shape(lambda: begin(nnx.merge(*model), stepper, batch, number, key, settings))
    groups = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape[1:]), leaf.dtype), made)
    return start(stepper, pinned(groups), settings)


@functools.partial(jax.jit, static_argnums=7, donate_argnums=2)
def _fill(
    model: Split,
    stepper: Stepper,
    decoding: Decoding,
    batch: Batch,
    number: Array,
    where: Array,
    key: Array,
    settings: Settings,
) -> Decoding:
    """Read the rows of `batch`, those of one shard after the other, into the slots `where` [shards, n] of
    their shards; where there is no such slot, nowhere."""
    shards = len(where)
    new = begin(nnx.merge(*model), stepper, pinned(batch), number, key, settings)
    groups = jax.tree.map(lambda old, new: put(shards, old, where, new), decoding.groups, new)
    return decoding._replace(groups=pinned(groups))

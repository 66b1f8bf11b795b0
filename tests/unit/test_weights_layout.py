"""Both ends of the wire cut and read buckets alike, and the two ends together move every byte."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from eopd.types import WeightTransferError
from eopd.weights.layout import (
    BucketHashError,
    ParameterMeta,
    bucket_num_bytes,
    cut_into_buckets,
    pack,
    unpack,
)
from eopd.weights.transfer import InitInfo, WeightReader, WeightReceiver, WeightSender
from eopd.weights.wire import WireError


class DictSource:
    """A ``ModelSource`` over a dict of tensors."""

    scale = None

    def __init__(self, tensors):
        self.tensors = tensors

    def metadata(self):
        return [ParameterMeta.of(name, t, t.shape) for name, t in self.tensors.items()]

    def gather(self, bucket):
        return [self.tensors[p.name] for p in bucket]


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        # 6 bytes: what follows is not aligned to 4
        "odd": torch.randn(3, generator=generator).bfloat16(),
        "wide": torch.randn(5, 7, generator=generator),
        "strided": torch.randn(4, 6, generator=generator).t(),
        "scalar": torch.tensor(2.5),
        "large": torch.randn(100, generator=generator),
    }


@pytest.mark.parametrize("bucket_bytes", [1, 64, 200, 10_000])
def test_buckets_keep_order_and_bytes(bucket_bytes):
    source = DictSource(tensors())
    buckets = cut_into_buckets(source.metadata(), bucket_bytes)
    assert [p.name for b in buckets for p in b] == list(source.tensors)

    for bucket in buckets:
        assert len(bucket) == 1 or bucket_num_bytes(bucket) <= bucket_bytes
        buffer = torch.empty(bucket_num_bytes(bucket), dtype=torch.uint8)
        pack(source.gather(bucket), buffer)

        for name, tensor in unpack(buffer, bucket):
            assert tensor.dtype == source.tensors[name].dtype
            assert torch.equal(tensor, source.tensors[name])


def test_a_wrong_sized_bucket_is_loud():
    with pytest.raises(ValueError, match="packed 12 bytes into a bucket of 13"):
        pack([torch.zeros(3)], torch.empty(13, dtype=torch.uint8))


def make_sender(source, **options):
    limits = {"connect_timeout_s": 20.0, "timeout_s": 20.0}
    options = {"backend": "gloo", "bucket_bytes": 100} | limits | options
    return WeightSender(source, rank=0, address="127.0.0.1", **options)


def connect(sender, num_receivers):
    """``open``, ``accept``, and so many receivers, each in its own thread."""
    infos = sender.open(num_receivers, "secret")
    with ThreadPoolExecutor() as pool:
        accepting = pool.submit(sender.accept)
        joining = [pool.submit(WeightReceiver, InitInfo(**info)) for info in infos]
        receivers = [future.result() for future in joining]
        accepting.result()

    return receivers


@pytest.mark.parametrize("backend", ["gloo", "shared"])
def test_the_other_workers_of_an_engine_read_what_its_first_one_has_received(backend):
    source = DictSource(tensors())
    sender = make_sender(source, backend=backend)
    (info,) = sender.open(1, "secret")
    with ThreadPoolExecutor() as pool:
        joining = pool.submit(WeightReceiver, InitInfo(**info))
        sender.accept()
        receiver = joining.result()

    reader = WeightReader(InitInfo(**info), receiver.memory)
    for _ in range(2):
        receiver.start()
        reader.start()
        source.tensors = {name: t + 1 for name, t in source.tensors.items()}
        sender.send()
        receiver.check()
        reader.check()

        for end in (reader, receiver):
            taken = dict(end.take())
            assert all(torch.equal(taken[name], t) for name, t in source.tensors.items())
            for tensor in taken.values():
                tensor.zero_()  # a loader that works in place disturbs nobody else


def test_memory_of_another_worker_that_cannot_be_read_is_a_failed_connection():
    (info,) = make_sender(DictSource(tensors())).open(1, "secret")
    with pytest.raises(WeightTransferError, match=r"cannot be mapped: .*No such file"):
        WeightReader(InitInfo(**info), "/proc/1/fd/100000")


def test_the_next_bucket_is_gathered_while_one_is_sent():
    """And no other one: two buckets are in host memory at a time."""
    source = DictSource(tensors())
    sender = make_sender(source)
    connect(sender, 1)[0].start()
    number, gathered, sent = {}, [], []
    moved = threading.Condition()
    gather, broadcast = source.gather, sender._wire.broadcast

    def note(seen, what):
        with moved:
            seen.append(what)
            moved.notify_all()

    def gather_and_note(bucket):
        assert len(sent) >= len(gathered) - 1
        note(gathered, bucket)
        return gather(bucket)

    def broadcast_late(message_B):
        due = min(len(sent) + 2, 4)
        with moved:
            number[len(sent)] = moved.wait_for(lambda: len(gathered) >= due, timeout=20)

        broadcast(message_B)
        note(sent, message_B.data_ptr())

    source.gather, sender._wire.broadcast = gather_and_note, broadcast_late
    sender.send()
    assert list(number.values()) == [True] * 4
    assert len(set(sent)) == 2


class CorruptingWire:
    """The sender's wire, with one bit flipped in one bucket on its way."""

    def __init__(self, wire, bucket):
        self.wire, self.countdown = wire, bucket

    def __getattr__(self, name):
        return getattr(self.wire, name)

    def broadcast(self, buffer):
        if self.countdown == 0:
            buffer[5] ^= 1

        self.countdown -= 1
        self.wire.broadcast(buffer)


def test_two_receivers_take_the_same_weights_twice():
    source = DictSource(tensors())
    sender = make_sender(source)
    receivers = connect(sender, 2)

    for _ in range(2):
        for receiver in receivers:
            receiver.start()

        source.tensors = {name: t + 1 for name, t in source.tensors.items()}
        assert sender.send() == sum(t.numel() * t.itemsize for t in source.tensors.values())

    for receiver in receivers:
        receiver.check()
        received = dict(receiver.take())
        assert received.keys() == source.tensors.keys()
        assert all(torch.equal(received[name], source.tensors[name]) for name in received)
        with pytest.raises(WeightTransferError, match="no weight transfer was started"):
            receiver.take()


def test_a_bucket_with_another_hash_is_named():
    source = DictSource(tensors())
    sender = make_sender(source)
    receivers = connect(sender, 2)
    whole = sender._wire
    for receiver in receivers:
        receiver.start()

    sender._wire = CorruptingWire(whole, bucket=1)
    sender.send()

    sent = r"bucket 2 of 4 \(wide to wide\) was sent as ([0-9a-f]{32})"
    for receiver in receivers:
        with pytest.raises(BucketHashError, match=rf"{sent} and arrived as (?!\1)"):
            receiver.check()

        with pytest.raises(BucketHashError):
            receiver.take()

    sender._wire = whole
    for receiver in receivers:
        receiver.start()

    sender.send()
    for receiver in receivers:
        receiver.check()
        assert all(torch.equal(tensor, source.tensors[name]) for name, tensor in receiver.take())


def test_a_sender_that_never_sends_costs_one_time_out():
    sender = make_sender(DictSource(tensors()), timeout_s=1.0, connect_timeout_s=60.0)
    (receiver,) = connect(sender, 1)
    receiver.start()

    with pytest.raises(
        WeightTransferError, match=r"did not end within 1 s|failed: .* Timed out waiting 1000ms"
    ):
        receiver.take()

    with pytest.raises(WireError, match="connect again"):
        receiver.start()


def test_an_engine_that_never_connects_costs_a_handshake():
    source = DictSource(tensors())
    sender = make_sender(source, timeout_s=3600.0, connect_timeout_s=1.0)
    present, _ = sender.open(2, "secret")

    with ThreadPoolExecutor() as pool:
        joining = pool.submit(WeightReceiver, InitInfo(**present))
        with pytest.raises(WireError, match=r"as rank 0 of 3, within connect_timeout_s = 1: "):
            sender.accept()

        with pytest.raises(WireError, match=r"as rank 1 of 3, within connect_timeout_s = 1: "):
            joining.result()

    (receiver,) = connect(sender, 1)
    receiver.start()
    sender.send()
    assert len(list(receiver.take())) == len(source.tensors)


def test_after_a_failure_the_source_is_walked_to_its_end():
    source = DictSource(tensors())
    sender = make_sender(source)
    gathered = []
    source.gather = lambda bucket: (
        gathered.append(bucket) or [source.tensors[p.name] for p in bucket]
    )
    with pytest.raises(WireError, match="open, accept"):
        sender.send()

    assert len(gathered) == 4
    (receiver,) = connect(sender, 1)
    receiver.start()
    sender._wire.close()
    with pytest.raises(WireError, match="closed"):
        sender.send()

    assert len(gathered) == 8
    with pytest.raises(WeightTransferError, match=r"the sender at .* has left"):
        receiver.take()


def test_a_source_that_fails_ends_the_receivers_transfer_at_once():
    source = DictSource(tensors())
    sender = make_sender(source, timeout_s=3600.0)
    (receiver,) = connect(sender, 1)
    receiver.start()
    del source.tensors["large"]
    with pytest.raises(KeyError, match="large"):
        sender.send()

    with pytest.raises(WeightTransferError, match=r"the sender at .* has left"):
        receiver.take()


def test_a_receiver_thread_that_ends_early_has_received_nothing(monkeypatch):
    sender = make_sender(DictSource(tensors()))
    (receiver,) = connect(sender, 1)

    def broken(message):
        raise IndexError("a fault of ours")

    monkeypatch.setattr(receiver._wire, "broadcast", broken)
    receiver.start()
    for look in (receiver.check, receiver.take):
        with pytest.raises(WeightTransferError, match="transfer failed: a fault of ours"):
            look()

"""Both ends of the wire cut and read buckets alike, and the two ends together move every byte."""

import threading

import pytest
import torch

from eopd.weights.layout import ParameterMeta, bucket_num_bytes, cut_into_buckets, pack, unpack
from eopd.weights.transfer import InitInfo, WeightReceiver, WeightSender


class DictSource:
    """A ``ParameterSource`` over a dict of tensors."""

    def __init__(self, tensors):
        self.tensors = tensors

    def metadata(self):
        return [ParameterMeta.of(name, t, t.shape) for name, t in self.tensors.items()]

    def gather(self, bucket):
        return [self.tensors[p.name] for p in bucket]


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "odd": torch.randn(3, generator=generator).bfloat16(),  # 6 bytes: what follows is not aligned to 4
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
            assert tensor.dtype == source.tensors[name].dtype and torch.equal(tensor, source.tensors[name])


def test_a_wrong_sized_bucket_is_loud():
    with pytest.raises(ValueError, match="packed 12 bytes into a bucket of 13"):
        pack([torch.zeros(3)], torch.empty(13, dtype=torch.uint8))


def test_two_receivers_take_the_same_weights_twice_and_an_untaken_transfer_is_thrown_away():
    source = DictSource(tensors())
    sender = WeightSender(source, rank=0, backend="gloo", address="127.0.0.1", bucket_bytes=100, timeout_s=20.0)
    infos = sender.open([1, 1])
    accepting = threading.Thread(target=sender.accept)
    accepting.start()
    receivers = [None, None]
    joining = [
        threading.Thread(target=lambda i=i: receivers.__setitem__(i, WeightReceiver(InitInfo(**infos[i]), 0)))
        for i in (0, 1)
    ]
    for thread in joining:
        thread.start()
    for thread in (*joining, accepting):
        thread.join()
    for _ in range(2):
        for receiver in receivers:
            receiver.start()
        source.tensors = {name: t + 1 for name, t in source.tensors.items()}
        assert sender.send() == sum(t.numel() * t.itemsize for t in source.tensors.values())
    for receiver in receivers:
        received = dict(receiver.take())
        assert received.keys() == source.tensors.keys()
        assert all(torch.equal(received[name], source.tensors[name]) for name in received)
        with pytest.raises(RuntimeError, match="no weight transfer was started"):
            dict(receiver.take())


def test_a_sender_that_never_sends_costs_one_time_out():
    sender = WeightSender(
        DictSource(tensors()), rank=0, backend="gloo", address="127.0.0.1", bucket_bytes=100, timeout_s=2.0
    )
    (info,) = sender.open([1])
    accepting = threading.Thread(target=sender.accept)
    accepting.start()
    receiver = WeightReceiver(InitInfo(**info), 0)
    accepting.join()
    receiver.start()
    with pytest.raises(RuntimeError, match="weight transfer"):
        list(receiver.take())

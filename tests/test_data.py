"""The data: the order of samples, the .bin files and their checks, the tokenizers.

Token n of a test file is `n` (plus an offset for each source), so a sample's first id tells which
source and which block it is, whatever the dataset says of itself.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import pickle
import random
import sys
import timeit
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    LINUX,
    POSIX,
    WORDS,
    most_memory,
    tiny_config,
    train_bpe,
    write_tokens,
    write_vocab,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors
from torch.utils.data import DataLoader

from testv2 import StreamingTokenDataset, TokenFile, Trainer, read_sidecar
from tinymamba.cli import UserError
from tinymamba.data_order import MixtureSchedule, ShardedBatches, permute
from tinymamba.token_shards import ShardedTokenFile, open_tokens, read_facts
from tinymamba.tokenizer import EOS_NAMES, SimpleTokenizer, byte_alphabet, find_tokenizer

S = 4  # block_size of the small files
FAR = 1_000_000  # token 0 of source k is k * FAR
MAX_BLOCKS = 40
EOS = "<|endoftext|>"
few, many = (settings(deadline=None, derandomize=True, max_examples=n) for n in (150, 300))


@contextlib.contextmanager
def refused(*fragments):
    """A UserError of one line: a field or file, what is wrong, what to do."""
    with pytest.raises(UserError) as caught:
        yield
    line = str(caught.value)
    assert "\n" not in line and all(caught.value.args), line
    assert line.index(": ") < line.rindex("; "), line
    for fragment in fragments:
        assert str(fragment) in line, line


def make(folder, *blocks, extra=0):
    """A file of so many blocks for each source, and `extra` tokens that fill no block."""
    for k, n in enumerate(blocks):
        write_tokens(folder / f"{k}.bin", k * FAR + np.arange(n * S + 1 + extra))
    return [folder / f"{k}.bin" for k in range(len(blocks))]


def where(x):
    """(source, block) of a sample's inputs, from the ids alone."""
    source, token = divmod(int(x[0]), FAR)
    assert token % S == 0
    return source, token // S


def epoch_of(data, number):
    return [where(data[number * len(data) + i][0]) for i in range(len(data))]


def every_block(*blocks):
    return [(k, b) for k, n in enumerate(blocks) for b in range(n)]


def exact_shares(weights):
    exact = [Fraction(str(w)) for w in weights]
    return [w / sum(exact) for w in exact]


# ------------------------------------------------------------------------------------ epochs


@pytest.mark.parametrize("extra", range(S))
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("blocks", [(50,), (1,), (20, 7, 33), (1, 40, 1)])
def test_each_epoch_reads_every_block_exactly_once(tmp_path, blocks, shuffle, extra):
    data = StreamingTokenDataset(make(tmp_path, *blocks, extra=extra), S, shuffle=shuffle)
    assert len(data) == sum(blocks)
    for number in (0, 1, 2, 1000):
        assert sorted(epoch_of(data, number)) == every_block(*blocks)


@pytest.mark.parametrize("blocks", [(50,), (20, 7, 33)])
def test_shuffled_epochs_have_different_orders_and_the_seed_decides_them(tmp_path, blocks):
    files = make(tmp_path, *blocks)
    data, again, other = (StreamingTokenDataset(files, S, shuffle=True, seed=s) for s in (5, 5, 6))
    orders = [epoch_of(data, number) for number in range(4)]
    assert len(set(map(tuple, orders))) == 4
    assert all(order != sorted(order) for order in orders)
    assert orders == [epoch_of(again, number) for number in range(4)]
    assert not any(epoch_of(other, number) in orders for number in range(4))


def test_sources_of_one_size_are_shuffled_differently(tmp_path):
    data = StreamingTokenDataset(make(tmp_path, 40, 40), S, shuffle=True)
    order = epoch_of(data, 0)
    assert [b for s, b in order if s == 0] != [b for s, b in order if s == 1]


def test_without_shuffling_each_source_is_read_in_file_order_in_every_epoch(tmp_path):
    data = StreamingTokenDataset(make(tmp_path, 20, 7, 33), S)
    order = epoch_of(data, 0)
    for source, blocks in enumerate((20, 7, 33)):
        assert [b for s, b in order if s == source] == list(range(blocks))
    assert order == epoch_of(data, 1) == epoch_of(data, 7)
    one = StreamingTokenDataset(make(tmp_path, 50), S)
    assert epoch_of(one, 0) == epoch_of(one, 3) == every_block(50)


def test_sources_are_mixed_evenly_all_through_the_epoch(tmp_path):
    order = epoch_of(StreamingTokenDataset(make(tmp_path, 100, 50), S, shuffle=True), 0)
    for begin in range(0, 150, 15):
        assert 8 <= sum(s == 0 for s, _ in order[begin : begin + 15]) <= 12


# ------------------------------------------------------------------------------------ weights

nasty = st.sampled_from([0.123456789, 1e-3, 0.1, 0.2, 0.6, 1 / 3, 1e-9, 1.0, 3, 7.5])
weight_lists = st.lists(nasty | st.floats(1e-3, 1e3), min_size=2, max_size=8)
block_counts = st.lists(st.integers(1, MAX_BLOCKS), min_size=8, max_size=8)


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """sized(k, n): the path of source k's file of n blocks; each is written once."""
    folder = tmp_path_factory.mktemp("sized")

    def path(k, n):
        file = folder / f"{k}-{n}.bin"
        return file if file.exists() else write_tokens(file, k * FAR + np.arange(n * S + 1))

    return path


@few
@given(weights=weight_lists, sizes=block_counts, shuffle=st.booleans())
@example(weights=[0.6, 0.2, 0.2], sizes=[30, 10, 10, 1, 1, 1, 1, 1], shuffle=True)
@example(weights=[1, 1, 1], sizes=[40, 40, 39, 1, 1, 1, 1, 1], shuffle=True)
@example(weights=[0.123456789, 1e-3], sizes=[40, 1, 1, 1, 1, 1, 1, 1], shuffle=False)
@example(weights=[1e-3, 1e3], sizes=[1, 40, 1, 1, 1, 1, 1, 1], shuffle=False)
@example(weights=[2.0**k for k in range(8)], sizes=[40] * 8, shuffle=True)
@example(weights=[624, 2, 5, 5, 647, 2, 996], sizes=[43, 6, 6, 6, 45, 6, 70], shuffle=True)
def test_weighted_sources_keep_their_share_and_repeat_no_block(sized, weights, sizes, shuffle):
    sizes = sizes[: len(weights)]
    files = [sized(k, n) for k, n in enumerate(sizes)]
    data, shares = StreamingTokenDataset(files, S, weights, shuffle), exact_shares(weights)
    fair = min((n - 4) / w for n, w in zip(sizes, shares, strict=True))
    assert len(data) >= max(1, fair - 1), "the epoch ends long before a source would run out"
    taken, i = Counter(), 0
    for _ in range(3):
        seen = set()
        for _ in range(len(data)):
            source, block = data.locate(i)
            assert (source, block) not in seen and 0 <= block < sizes[source]
            seen.add((source, block))
            taken[source] += 1
            i += 1
            for k, share in enumerate(shares):
                assert abs(taken[k] - i * share) <= 2
    for number in (348_902, 10**6, 10**9 // len(data)):  # the first is hard for the last example
        late = [data.locate(number * len(data) + j) for j in range(len(data))]
        assert len(set(late)) == len(data) and all(b < sizes[s] for s, b in late)


@many
@given(weights=weight_lists, n=st.integers(0, 10**9))
@example(weights=[0.123456789, 1e-3, 1e-9], n=10**9)
@example(weights=[1, 1, 1], n=10**9)
def test_shares_hold_within_two_samples_at_any_number(sized, weights, n):
    files = [sized(k, 30) for k in range(len(weights))]
    deal = StreamingTokenDataset(files, S, weights).schedule.counts
    counts, after = deal(n), deal(n + 1)
    assert sum(counts.values()) == n and set(counts) == set(range(len(weights)))
    assert sorted(after[k] - counts[k] for k in counts) == [0] * (len(weights) - 1) + [1]
    for k, share in enumerate(exact_shares(weights)):
        assert abs(counts[k] - n * share) <= 2 + Fraction(1, 1000)


def test_thousands_of_sources_hold_their_shares_too():
    rng = random.Random(0)
    weights = [rng.randint(500, 1000) for _ in range(3000)]
    deal, total = MixtureSchedule(weights).counts, sum(weights)
    for n in (rng.randrange(10**9) for _ in range(50)):
        counts = deal(n)
        assert all(abs(counts[k] * total - n * w) <= 2 * total for k, w in enumerate(weights))


@pytest.mark.parametrize("weights", [[0.6, 0.2, 0.2], [3, 1, 1], [60, 20, 20]])
def test_sources_in_proportion_to_their_weights_are_read_whole(tmp_path, weights):
    data = StreamingTokenDataset(make(tmp_path, 33, 11, 11), S, weights, shuffle=True)
    assert sorted(epoch_of(data, 0)) == sorted(epoch_of(data, 1)) == every_block(33, 11, 11)


def test_equal_files_of_equal_weight_lose_nothing_of_the_shorter(tmp_path):
    data = StreamingTokenDataset(make(tmp_path, 40, 25), S, [1, 1])
    assert len(data) == 50 and {b for s, b in epoch_of(data, 0) if s == 1} == set(range(25))


def test_weights_may_be_any_numbers(tmp_path):
    files = make(tmp_path, 30, 10)
    orders = [
        epoch_of(StreamingTokenDataset(files, S, weights), 0)
        for weights in ([3, 1], (0.75, 0.25), np.array([0.75, 0.25]), torch.tensor([3.0, 1.0]))
    ]
    assert all(order == orders[0] for order in orders)


# -------------------------------------------------------------------------------- pure function


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("weights", [None, [0.6, 0.3, 0.1]])
def test_a_sample_does_not_depend_on_what_was_read_before(tmp_path, weights, shuffle):
    files = make(tmp_path, 20, 7, 33)
    data = StreamingTokenDataset(files, S, weights, shuffle)
    read = [data[i] for i in range(3 * len(data))]
    for i in [*range(0, len(read), 7), 10**9]:
        fresh = StreamingTokenDataset(files, S, weights, shuffle)
        assert fresh[i][0].equal(data[i][0])
        assert i == 10**9 or fresh[i][0].equal(read[i][0])
    assert where(data[10**9][0]) == data.locate(10**9)


def test_sample_one_milliard_is_immediate_and_takes_no_memory(tmp_path):
    weights = [0.123456789, 1e-3, 0.5, 0.25, 0.3, 0.7, 0.11, 0.13]
    data = StreamingTokenDataset(make(tmp_path, *[MAX_BLOCKS] * 8), S, weights, shuffle=True)
    tracemalloc.start()
    begin = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    data.locate(10**9)
    peak = tracemalloc.get_traced_memory()[1] - begin
    tracemalloc.stop()
    assert peak < 50_000
    assert min(timeit.repeat(lambda: data.locate(10**9), number=10, repeat=5)) / 10 < 2e-3


def test_pickled_dataset_carries_no_tokens_and_reads_the_same(tmp_path):
    data = StreamingTokenDataset(make(tmp_path, 100_000, 1000), S, [1, 1], shuffle=True)
    before = [data[i] for i in range(20)]
    frozen = pickle.dumps(data)
    assert len(frozen) < 5000
    thawed = pickle.loads(frozen)
    assert all(thawed[i][0].equal(before[i][0]) for i in range(20))
    assert data[0][0].equal(before[0][0]), "the original still works"


def test_spawned_worker_reads_the_same(tmp_path):
    data = StreamingTokenDataset(make(tmp_path, 20, 7), S, shuffle=True)
    expected = [x for x, _ in data]
    spawned = DataLoader(data, 9, num_workers=1, multiprocessing_context="spawn")
    assert torch.cat([x for x, _ in spawned]).equal(torch.stack(expected))


def test_negative_numbers_are_no_samples(tmp_path):
    data = StreamingTokenDataset(make(tmp_path, 5), S)
    with pytest.raises(IndexError):
        data[-1]
    with pytest.raises(IndexError):
        data.locate(-5)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_numpy_and_torch_integers_number_the_same_samples(tmp_path, kind):
    weights = [0.1234567890123457, 0.876543210987654]
    data = StreamingTokenDataset(make(tmp_path, 30, 30), S, weights, shuffle=True)
    numbers = [3, 1000, 10**9]
    assert [data.locate(kind(i)) for i in numbers] == [data.locate(i) for i in numbers]


@pytest.mark.parametrize("change", ["name", "length", "dtype", "block_size", "seed", "weights"])
def test_fingerprint_changes_with_whatever_changes_the_order(tmp_path, change):
    def fingerprint(name="a.bin", n=100, dtype=np.int32, block_size=S, seed=1, weights=(1, 1)):
        file = write_tokens(tmp_path / name, np.arange(n), dtype)
        files = [file, write_tokens(tmp_path / "z.bin", np.arange(100))]
        (tmp_path / "a.json").write_text(json.dumps({"dtype": np.dtype(dtype).name}))
        return StreamingTokenDataset(files, block_size, weights, seed=seed).fingerprint()

    other = {
        "name": {"name": "b.bin"}, "length": {"n": 101}, "dtype": {"dtype": np.uint16},
        "block_size": {"block_size": 5}, "seed": {"seed": 2}, "weights": {"weights": [2, 1]},
    }  # fmt: skip
    assert fingerprint() == fingerprint() != fingerprint(**other[change])
    assert json.loads(json.dumps(fingerprint())) == fingerprint()


# ------------------------------------------------------------------------------------ permute


@many
@given(st.integers(1, 300), st.binary(min_size=1, max_size=64))
@example(1, b"k")
@example(2, b"k")
@example(256, b"k")
@example(257, b"k")
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("key", [b"one", b"two", b"three"])
def test_permute_looks_shuffled(key):
    size = 2000
    order = np.array([permute(i, size, key) for i in range(size)])
    steps = np.diff(order)
    assert (order == np.arange(size)).sum() < 10  # 1 expected
    assert (np.abs(steps) == 1).sum() < 15  # 2 expected
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.1
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1
    assert len(np.unique(steps)) > size // 2
    for bit in (0, 1, 5, 9):  # neighbors do not share bits of their places
        assert abs(np.mean((order[1:] >> bit & 1) == (order[:-1] >> bit & 1)) - 0.5) < 0.1


def test_permute_sends_an_index_everywhere_over_the_keys():
    size, keys = 10, [b"%d" % k for k in range(3000)]
    for index in (0, 9):
        counts = Counter(permute(index, size, key) for key in keys)
        assert len(counts) == size and all(200 < n < 400 for n in counts.values()), counts


# ------------------------------------------------------------------------ bytes of the samples


@pytest.mark.parametrize("how", ["int32", "uint16 by data_dtype", "uint16 by sidecar"])
def test_samples_are_the_files_tokens_and_targets_the_next_ones(tmp_path, how):
    block_size, dtype = 7, np.dtype(how.split()[0])
    tokens = np.random.default_rng(0).integers(0, 60_000, 5 * block_size + 4)
    file = write_tokens(tmp_path / "t.bin", tokens, dtype)
    if how.endswith("sidecar"):
        (tmp_path / "t.json").write_text('{"dtype": "uint16"}')
    said = "uint16" if how.endswith("data_dtype") else "auto"
    data = StreamingTokenDataset(file, block_size, data_dtype=said, vocab_size=60_000)
    assert len(data) == 5
    for i in range(5):
        x, y = data[i]
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (block_size,)
        assert x.tolist() == tokens[i * block_size : (i + 1) * block_size].tolist()
        assert y.tolist() == tokens[i * block_size + 1 : (i + 1) * block_size + 1].tolist()


def test_reading_a_sample_leaves_the_file_and_later_samples_alone(tmp_path):
    (file,) = make(tmp_path, 5)
    before, data = file.read_bytes(), StreamingTokenDataset(file, S)
    data[0][0].fill_(-7)
    assert data[0][0].tolist() == list(range(S)) and file.read_bytes() == before


def test_shortest_file_has_one_block_and_a_path_needs_no_list(tmp_path):
    (file,) = make(tmp_path, 1)
    for source in (file, str(file), [file], (str(file),)):
        data = StreamingTokenDataset(source, S)
        assert len(data) == 1 and data[0][1].tolist() == [1, 2, 3, 4]


def test_iterating_gives_one_epoch_in_order(tmp_path):
    data = StreamingTokenDataset(make(tmp_path, 20, 7), S, shuffle=True)
    pairs = list(data)
    assert len(pairs) == 27 == len(list(data))
    assert [where(x) for x, _ in pairs] == epoch_of(data, 0)
    assert all(y[:-1].equal(x[1:]) for x, y in pairs)


def test_a_plain_dataloader_gives_one_epoch_in_batches(tmp_path):
    data = StreamingTokenDataset(make(tmp_path, 20, 7), S, shuffle=True)
    batches = list(DataLoader(data, batch_size=4))
    assert [tuple(x.shape) for x, _ in batches] == [(4, S)] * 6 + [(3, S)]
    assert [where(x) for batch, _ in batches for x in batch] == epoch_of(data, 0)


def test_using_multiple_datasets_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "text").mkdir(parents=True)
    for k in range(3):
        ids = k * FAR + np.arange(100 * 32 + 1)
        write_tokens(tmp_path / "data" / "text" / f"dataset{k + 1}.bin", ids)
    names = {"StreamingTokenDataset": StreamingTokenDataset, "config": tiny_config()}
    exec(README_MULTIPLE, names)
    data = names["train_dataset"]
    assert all(len(x) == len(y) == 32 for x, y in data)
    sources = Counter(int(x[0]) // FAR for x, _ in islice(data, 100))
    assert all(abs(sources[k] - n) <= 2 for k, n in enumerate((60, 20, 20)))
    assert len(data) >= 150


README_MULTIPLE = """
# Create datasets with weighting
train_datasets = [
    './data/text/dataset1.bin',  # General text
    './data/text/dataset2.bin',  # Code
    './data/text/dataset3.bin'   # Math
]
weights = [0.6, 0.2, 0.2]  # 60% general, 20% code, 20% math

# Create dataset
train_dataset = StreamingTokenDataset(
    train_datasets,
    block_size=config.block_size,
    weights=weights,
    shuffle=True
)
"""


# ---------------------------------------------------------------------------- ranks and workers


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_ranks_and_workers_read_the_same_samples_in_the_same_order(tmp_path, world, workers):
    data = StreamingTokenDataset(make(tmp_path, 20, 7, 33), S, [3, 1, 2], shuffle=True, seed=3)
    first, last, batch = 17, 17 + 2 * len(data) + 1, 4  # from the middle, into the next epochs
    assert (last - first) % batch and ((last - first) // batch) % 4
    context = "fork" if workers and sys.platform == "linux" else None
    ranks = []
    for rank in range(world):
        plan = ShardedBatches(first, last, batch, rank, world)
        loader = DataLoader(
            data, batch_sampler=plan, num_workers=workers, multiprocessing_context=context
        )
        ranks.append([where_all(x) for x, _ in loader])
        assert len(plan) == len(ranks[-1])
    dealt = [b for round_ in zip_longest(*ranks, fillvalue=[]) for b in round_]
    assert [s for b in dealt for s in b] == [data.locate(i) for i in range(first, last)]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def where_all(batch):
    return [where(x) for x in batch]


@pytest.mark.parametrize("first, last", [(0, 32), (5, 38), (0, 3), (7, 7), (10**9, 10**9 + 21)])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharded_batches_deal_each_number_once_in_turn(first, last, world):
    plans = [ShardedBatches(first, last, 4, rank, world) for rank in range(world)]
    turns = zip_longest(*plans, fillvalue=[])
    dealt = [i for turn in turns for batch in turn for i in batch]
    assert dealt == list(range(first, last))
    assert [len(p) for p in plans] == [len(list(p)) for p in plans]
    assert sum(map(len, plans)) == -(-(last - first) // 4)
    assert list(plans[0]) == list(plans[0]), "a plan can be walked again"


# -------------------------------------------------------------------------------- constant memory


@POSIX
def test_file_of_several_gigabytes_is_opened_and_read_in_constant_memory(tmp_path):
    file, i = tmp_path / "huge.bin", 10**8
    with open(file, "wb") as f:
        f.truncate(16 * (i + 1000) * 4)  # 6.4 GB, nearly all of it a hole
        f.seek(16 * i * 4)
        f.write(np.arange(17, dtype=np.int32).tobytes())
    before = most_memory()
    tracemalloc.start()
    data = StreamingTokenDataset(file, 16)
    x, y = data[i]
    shuffled = StreamingTokenDataset(file, 16, shuffle=True)
    assert len(shuffled[i][0]) == 16
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.tolist() == list(range(16)) and y.tolist() == list(range(1, 17))
    assert len(data) == 10**8 + 999
    assert peak < 1_000_000
    assert most_memory() - before < 64_000_000


def test_a_sample_takes_as_many_calls_for_a_long_block_and_reads_nothing_else(
    tmp_path, monkeypatch
):
    """There is no loop over tokens, and inputs and targets are views of one copy of the block."""
    write_tokens(tmp_path / "a.bin", np.arange(100_000) % 50)
    calls, ranges, read = {}, [], TokenFile.read
    monkeypatch.setattr(
        TokenFile, "read", lambda file, *ends: (ranges.append(ends), read(file, *ends))[1]
    )
    for size in (16, 4096):
        data = StreamingTokenDataset(tmp_path / "a.bin", size, vocab_size=50)
        data[0]  # maps the file
        ranges.clear()
        counted = Counter()
        sys.setprofile(lambda frame, event, what, counted=counted: counted.update([event]))
        try:
            x, y = data[1]
        finally:
            sys.setprofile(None)
        calls[size] = counted["call"] + counted["c_call"]
        assert {end - begin for begin, end in ranges} == {size + 1} and len(ranges) == 2
        assert x.untyped_storage().nbytes() == 8 * (size + 1)
        assert x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert calls[16] == calls[4096] < 150


def test_checking_ids_takes_constant_memory(tmp_path):
    with open(tmp_path / "large.bin", "wb") as f:
        f.truncate(64_000_000)
    tracemalloc.start()
    StreamingTokenDataset(tmp_path / "large.bin", S, vocab_size=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


# ------------------------------------------------------------------------------------ bad ids


@pytest.mark.parametrize("bad", [100, 101, 2**31 - 1, -1, -(2**31)])
@pytest.mark.parametrize("offset", [0, 57, 80])
def test_an_id_outside_the_vocabulary_is_refused_at_once_and_named(tmp_path, bad, offset):
    ids = np.arange(81)  # 20 blocks
    ids[offset] = bad
    file = write_tokens(tmp_path / "t.bin", ids)
    good = write_tokens(tmp_path / "good.bin", np.arange(81))
    with refused(file, f"id {bad} at offset {offset} ", "vocab_size"):
        StreamingTokenDataset([good, file], S, vocab_size=100)


def test_ids_up_to_the_vocabulary_are_accepted(tmp_path):
    file = write_tokens(tmp_path / "t.bin", [0, 99] * 10)
    assert StreamingTokenDataset(file, S, vocab_size=100)[0][0].tolist() == [0, 99, 0, 99]
    with refused(file, "id 99 at offset 1 "):
        StreamingTokenDataset(file, S, vocab_size=99)


@pytest.mark.parametrize("offset", [(1 << 22) - 1, 1 << 22, (1 << 22) + 4321, (1 << 22) + 9999])
def test_a_bad_id_is_found_beyond_the_first_four_million(tmp_path, offset):
    ids = np.zeros((1 << 22) + 10_000, np.uint16)
    ids[offset] = ids[-1] = 700
    file = write_tokens(tmp_path / "t.bin", ids, np.uint16)
    with refused(file, f"id 700 at offset {offset} "):
        StreamingTokenDataset(file, S, vocab_size=700, data_dtype="uint16")


def test_an_id_that_turns_bad_after_opening_is_caught_before_it_is_handed_out(tmp_path):
    (file,) = make(tmp_path, 20)
    data = StreamingTokenDataset(file, S, vocab_size=100)
    data[5]
    with open(file, "r+b") as f:
        f.seek(22 * 4)
        f.write(np.int32(100).tobytes())
    with refused(file, "id 100 at offset 22 "):
        data[5]
    assert data[4][0].tolist() == [16, 17, 18, 19], "the other blocks can still be read"


@POSIX
@pytest.mark.parametrize("vocab_size", [None, 1000])
@pytest.mark.parametrize("left", [22, 10])
def test_a_file_cut_after_opening_is_refused_and_gives_no_short_sample(tmp_path, vocab_size, left):
    (file,) = make(tmp_path, 20)
    data = StreamingTokenDataset(file, S, vocab_size=vocab_size)
    data = pickle.loads(pickle.dumps(data))  # as a spawned worker gets it
    write_tokens(file, np.arange(left))
    with refused(file):
        data[5]


@LINUX
def test_a_file_cut_while_it_is_read_does_not_kill_the_process(tmp_path):
    (file,) = make(tmp_path, 20_000)
    data = StreamingTokenDataset(file, S)
    data[0]

    def read_on():
        faulthandler.disable()  # pytest's would print a page
        os.truncate(file, 50 * 4)
        with refused(file):
            data[19_999]

    child = multiprocessing.get_context("fork").Process(target=read_on)
    child.start()
    child.join()
    assert child.exitcode == 0


def test_uint16_ids_read_as_int32_are_recognised(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50_257, 1000)
    file = write_tokens(tmp_path / "t.bin", ids, np.uint16)
    with refused(file, "--data_dtype uint16"):
        StreamingTokenDataset(file, S, vocab_size=50_257)
    odd = write_tokens(tmp_path / "odd.bin", ids[:999], np.uint16)
    with refused(odd, "1998 bytes", "--data_dtype uint16"):
        StreamingTokenDataset(odd, S)
    data = StreamingTokenDataset([file, odd], S, vocab_size=50_257, data_dtype="uint16")
    assert len(data) == 249 + 249


def test_one_large_id_does_not_look_like_uint16(tmp_path):
    ids = np.arange(1000)
    ids[500] = 51_000
    with refused("id 51000 at offset 500 ", "raise --vocab_size"):
        StreamingTokenDataset(write_tokens(tmp_path / "t.bin", ids), S, vocab_size=50_257)


@pytest.mark.parametrize("bad, vocab_size", [(70_000, 50_304), (128_000, 100_000)])
def test_int32_ids_above_65535_do_not_look_like_uint16(tmp_path, bad, vocab_size):
    ids = np.arange(1000)
    ids[500] = bad
    with refused(f"id {bad} at offset 500 ", "raise --vocab_size"):
        StreamingTokenDataset(write_tokens(tmp_path / "t.bin", ids), S, vocab_size=vocab_size)


# ------------------------------------------------------------------------------------ bad files


@pytest.mark.parametrize("size", [1, 3, 101, 4001])
@pytest.mark.parametrize("dtype", ["auto", "int32", "uint16"])
def test_a_file_of_odd_size_is_refused(tmp_path, size, dtype):
    (tmp_path / "t.bin").write_bytes(bytes(size))
    with refused(tmp_path / "t.bin", f"{size} bytes", "cut off"):
        StreamingTokenDataset(tmp_path / "t.bin", S, data_dtype=dtype)


@pytest.mark.parametrize("tokens", [0, 1, S])
@pytest.mark.parametrize("vocab_size", [None, 100])
def test_an_empty_or_too_short_file_is_refused(tmp_path, tokens, vocab_size):
    file = write_tokens(tmp_path / "t.bin", np.arange(tokens))
    with refused(file, f"{tokens} tokens", f"block_size={S}", S + 1):
        StreamingTokenDataset([*make(tmp_path, 5), file], S, vocab_size=vocab_size)


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    (tmp_path / "folder.bin").mkdir()
    for name in ("no.bin", "folder.bin"):
        with refused(tmp_path / name, "prepare.py"):
            StreamingTokenDataset([*make(tmp_path, 5), tmp_path / name], S)
        with refused(tmp_path / name):
            TokenFile(tmp_path / name)


def test_no_source_at_all_is_refused():
    with refused():
        StreamingTokenDataset([], S)


@pytest.mark.parametrize(
    "text",
    ["", "{", "no json", "[]", "7", "null", '"int32"', '{"dtype": "int31"}', '{"dtype": 3}',
     b"\xff\xfe\x00", b"\x93NUMPY"],
)  # fmt: skip
def test_a_sidecar_that_is_no_description_is_refused(tmp_path, text):
    (file,) = make(tmp_path, 5)
    (tmp_path / "0.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with refused(tmp_path / "0.json", "fix it or delete it"):
        StreamingTokenDataset(file, S)
    with refused(tmp_path / "0.json"):
        read_sidecar(str(file))


# Built without vocab_size, so nothing is read: reading "object" ids ends the process (SIGSEGV).
@pytest.mark.parametrize("dtype", ["object", "float32", "complex64", "bool", "U4"])
def test_a_sidecar_dtype_that_holds_no_ids_is_refused(tmp_path, dtype):
    file = write_tokens(tmp_path / "t.bin", np.zeros(160))
    (tmp_path / "t.json").write_text(json.dumps({"dtype": dtype}))
    with refused(tmp_path / "t.json"):
        StreamingTokenDataset(file, S)


@pytest.mark.parametrize("said, flag", [("uint16", "int32"), ("int32", "uint16")])
def test_a_data_dtype_that_contradicts_the_sidecar_is_refused(tmp_path, said, flag):
    (file,) = make(tmp_path, 5)
    (tmp_path / "0.json").write_text(json.dumps({"dtype": said}))
    with refused("data_dtype", flag, said, file):
        StreamingTokenDataset(file, S, data_dtype=flag)
    for agreed in (said, "auto"):
        file = write_tokens(tmp_path / "0.bin", np.arange(21), said)
        assert StreamingTokenDataset(file, S, data_dtype=agreed)[1][0].tolist() == [4, 5, 6, 7]


def test_a_file_that_is_not_as_long_as_its_sidecar_says_is_refused(tmp_path):
    (file,) = make(tmp_path, 5)
    (tmp_path / "0.json").write_text('{"tokens": 22}')
    with refused(file, "21 tokens", "22"):
        StreamingTokenDataset(file, S)


def test_a_sidecar_may_say_nothing_of_the_dtype_and_more_than_it(tmp_path):
    (file,) = make(tmp_path, 5)
    assert read_sidecar(str(file)) == {}
    facts = {"vocab_size": 100, "tokens": 21, "bytes": 80, "eos_id": 7, "made_by": "hand"}
    (tmp_path / "0.json").write_text(json.dumps(facts))
    assert read_sidecar(str(file)) == facts
    assert StreamingTokenDataset(file, S)[1][0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "weights, fragment",
    [
        ([0.5, -0.5], "-0.5"),
        ([1, 0], "weight 0"),
        ([0, 0], "weight 0"),
        ([float("nan"), 1], "nan"),
        ([float("inf"), 1], "inf"),
        ([1, 1, 1], "3 weights for 2 sources"),
        ([1], "1 weights for 2 sources"),
        ([], "0 weights for 2 sources"),
    ],
)
def test_weights_that_are_no_shares_are_refused(tmp_path, weights, fragment):
    with refused("train_data_weights: ", fragment):
        StreamingTokenDataset(make(tmp_path, 5, 5), S, weights)


# ------------------------------------------------------------------------------------ tokenizers

HARD = [
    "", "\x00\x7f", "\r\n\r\n", "a\rb", "\t  x \n", "é", "日本語🙂", "\ufeffBOM", "\ufffd",
    "\u2028\x85", EOS, f"a{EOS}b", "</s><eos>", "<0x41><0xE9>", "<|im_start|>user", "ĠĊ", "▁the",
    "e\u0301 שלום",
]  # fmt: skip


KINDS = pytest.mark.parametrize("kind", ["bytes", "gpt2", "words", "byte tokens", "json"])
texts = st.text(max_size=40) | st.lists(st.sampled_from([*WORDS, *HARD]), max_size=6).map("".join)


@KINDS
@many
@given(text=texts)
def test_every_string_survives_the_round_trip(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < len(tokenizer) for i in ids)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text


@KINDS
@pytest.mark.parametrize("text", HARD)
def test_hard_strings_survive_the_round_trip(tokenizers, kind, text):
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


def test_bytes_are_their_own_ids(tokenizers):
    tokenizer = tokenizers["bytes"]
    assert tokenizer.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)


def test_merged_tokens_are_used(tokenizers):
    assert len(tokenizers["gpt2"].encode("the theme of the other")) < 12
    assert len(tokenizers["words"].encode("the theme 日本")) == 5
    assert len(tokenizers["byte tokens"].encode("the theme 日本")) == 5


def test_byte_tokens_stand_for_their_bytes(tokenizers):
    tokenizer, first = tokenizers["byte tokens"], 3  # the line of <0x00>
    assert tokenizer.encode("xö\0") == [first + b for b in "xö\0".encode()]
    assert tokenizer.decode([first + b for b in "xö\0🙂".encode()]) == "xö\0🙂"
    assert len(tokenizer) == first + 256 + len(WORDS)


@many
@given(
    vocab=st.lists(st.text("abcé", min_size=1, max_size=4), unique=True, max_size=12),
    text=st.text("abcé", max_size=20),
)
@example(vocab=["a", "ab", "abc", "bcd", "d"], text="abcd")
def test_the_longest_token_that_matches_is_taken(tmp_path_factory, vocab, text):
    path = tmp_path_factory.getbasetemp() / "longest.txt"
    tokenizer = SimpleTokenizer(write_vocab(path, vocab))
    ids, at, data = tokenizer.encode(text), 0, text.encode()
    for i in ids:
        fitting = [t.encode() for t in vocab if data[at:].startswith(t.encode())]
        longest = max(map(len, fitting), default=1)
        if fitting:
            assert vocab[i].encode() == max(fitting, key=len)
        else:
            assert i >= len(vocab)
        at += longest
    assert at == len(data)


def test_line_i_is_id_i_and_missing_bytes_come_after_the_last(tmp_path):
    tokenizer = SimpleTokenizer(write_vocab(tmp_path / "v.txt", WORDS))
    assert [tokenizer.encode(word) for word in WORDS] == [[i] for i in range(len(WORDS))]
    assert [tokenizer.decode([i]) for i in range(len(WORDS))] == WORDS
    assert min(tokenizer.encode("xyzö")) >= len(WORDS)
    assert len(tokenizer) == len(WORDS) + 256 - 2  # " " and "e" are there already
    assert tokenizer.eos_token_id is None


def test_duplicates_and_blank_lines_shift_no_id(tmp_path):
    tokenizer = SimpleTokenizer(write_vocab(tmp_path / "v.txt", ["a", "", "b", "a", "", "c", ""]))
    assert tokenizer.decode([0, 1, 2, 3, 4, 5, 6]) == "abac"
    assert tokenizer.encode("abc") == [0, 2, 5]
    assert tokenizer.decode(tokenizer.encode("x")) == "x" and min(tokenizer.encode("x")) >= 7


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "end"])
def test_line_ends_and_a_missing_last_one_make_no_difference(tmp_path, end, last):
    lines = ["ab", "c d", "é", "x\u2028y", "x\x85y", "x\x0cy"]  # none of these three ends a line
    (tmp_path / "v.txt").write_bytes((end.join(lines) + (end if last else "")).encode())
    tokenizer = SimpleTokenizer(tmp_path / "v.txt")
    assert [tokenizer.decode([i]) for i in range(len(lines))] == lines
    assert min(tokenizer.encode("\n")) >= len(lines)
    assert len(tokenizer) == len(lines) + 256


def test_a_token_with_a_carriage_return_shifts_no_id(tmp_path):
    lines = ["a", "x\ry", "\r", "b"]
    tokenizer = SimpleTokenizer(write_vocab(tmp_path / "v.txt", lines))
    assert [tokenizer.decode([i]) for i in range(4)] == lines


def test_a_byte_order_mark_is_no_part_of_the_first_token(tmp_path):
    (tmp_path / "v.txt").write_bytes("the\nword\n".encode("utf-8-sig"))
    assert SimpleTokenizer(tmp_path / "v.txt").encode("theword") == [0, 1]


def test_an_empty_vocabulary_reads_bytes(tmp_path):
    (tmp_path / "v.txt").write_bytes(b"")
    tokenizer = SimpleTokenizer(tmp_path / "v.txt")
    assert tokenizer.decode(tokenizer.encode("aé")) == "aé"


@KINDS
def test_special_tokens_in_text_are_text_unless_allowed(tokenizers, kind):
    tokenizer = tokenizers[kind]
    eos = "</s>" if kind == "byte tokens" else EOS
    text, special = f"the {eos}word{eos}", tokenizer.eos_token_id
    plain = tokenizer.encode(text)
    assert special not in plain and tokenizer.decode(plain) == text
    read = tokenizer.encode(text, allow_special=True)
    assert read.count(special) == 2 and read[-1] == special
    assert tokenizer.decode(read) == "the word"
    assert tokenizer.decode(read, skip_special_tokens=False) == text
    assert tokenizer.encode(text) == plain, "what one call allows, the next does not"
    assert tokenizer.encode("the word", allow_special=True) == tokenizer.encode("the word")


def test_special_tokens_of_a_chat_are_told_apart(tmp_path):
    lines = [*WORDS, "<|im_start|>", "<|im_end|>", EOS]
    tokenizer = SimpleTokenizer(write_vocab(tmp_path / "v.txt", lines))
    text = "<|im_start|>the word<|im_end|>"
    assert not {8, 9, 10} & set(tokenizer.encode(text))
    assert tokenizer.encode(text, allow_special=True) == [8, 0, 1, 5, 9]
    assert tokenizer.decode([8, 0, 1, 5, 9, 10]) == "the word"
    assert tokenizer.decode([8, 0, 9], skip_special_tokens=False) == "<|im_start|>the<|im_end|>"
    assert tokenizer.eos_token_id == 10


@pytest.mark.parametrize("name", EOS_NAMES)
def test_end_of_text_is_found_by_its_name(tmp_path, name):
    tokenizer = SimpleTokenizer(write_vocab(tmp_path / "vocab.txt", ["a", "b", name, "c"]))
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 2
    train_bpe("<first>", name).save(str(tmp_path / "tokenizer.json"))
    assert SimpleTokenizer(tmp_path / "tokenizer.json").eos_token_id == 1


def test_the_length_counts_tokens_added_to_a_json_later(tmp_path):
    bpe = train_bpe(EOS)
    before = bpe.get_vocab_size()
    bpe.add_special_tokens(["<new>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert len(SimpleTokenizer(tmp_path / "tokenizer.json")) == before + 1


def test_no_end_of_text_is_none(tmp_path):
    train_bpe("<first>").save(str(tmp_path / "tokenizer.json"))
    assert SimpleTokenizer(tmp_path / "tokenizer.json").eos_token_id is None


def test_a_template_of_the_json_adds_nothing_to_the_text(tmp_path):
    bpe = train_bpe(EOS)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = SimpleTokenizer(tmp_path / "tokenizer.json")
    assert 0 not in tokenizer.encode("the word") + tokenizer.encode("a", allow_special=True)


@KINDS
def test_ids_cut_inside_a_character_give_replacement_characters(tokenizers, kind):
    tokenizer = tokenizers[kind]
    before, ids = len(tokenizer.encode("the ")), tokenizer.encode("the 🙂")
    assert len(ids) == before + 4
    for end in range(before + 1, before + 4):
        cut = tokenizer.decode(ids[:end])
        assert cut.startswith("the ") and set(cut[4:]) == {"\ufffd"}
    assert set(tokenizer.decode(ids[before + 1 :])) == {"\ufffd"}


@KINDS
def test_decode_takes_lists_arrays_and_tensors(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = [*tokenizer.encode("the word é"), tokenizer.eos_token_id]
    for same in (ids, tuple(ids), np.array(ids), torch.tensor(ids), iter(ids)):
        assert tokenizer.decode(same) == "the word é"
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == []


@KINDS
def test_ids_beyond_the_vocabulary_do_not_break_decode(tokenizers, kind):
    """A model's vocab_size may be rounded up, and an untrained one samples those ids."""
    tokenizer = tokenizers[kind]
    text = tokenizer.decode([*tokenizer.encode("the"), len(tokenizer), len(tokenizer) + 1000])
    assert text == ("the" if kind == "json" else "the\ufffd\ufffd")  # the library drops them


def reference_alphabet():
    """As in GPT-2's encoder.py, by hand."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in kept} | {
        b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in kept)
    }


def test_byte_alphabet_is_that_of_gpt2():
    alphabet = byte_alphabet()
    assert dict(enumerate(alphabet)) == reference_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert (alphabet[32], alphabet[10], alphabet[255]) == ("Ġ", "Ċ", "ÿ")
    text = "".join(
        map(chr, [*range(0x180), 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF])
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((written, _),) = level.pre_tokenize_str(text)
    assert written == "".join(alphabet[b] for b in text.encode())


def test_byte_alphabet_is_that_of_transformers():
    slow = pytest.importorskip("transformers.convert_slow_tokenizer")
    assert dict(enumerate(byte_alphabet())) == slow.bytes_to_unicode()


@many
@given(text=texts)
def test_vocab_txt_of_a_byte_level_tokenizer_decodes_its_ids_exactly(tokenizers, bpe, text):
    bpe.encode_special_tokens = True
    assert tokenizers["gpt2"].decode(bpe.encode(text).ids) == text
    assert len(tokenizers["gpt2"]) == bpe.get_vocab_size()


def test_find_tokenizer_prefers_the_json_beside_the_data(tmp_path, bpe):
    assert find_tokenizer(str(tmp_path / "train.bin")) is None
    write_vocab(tmp_path / "vocab.txt", WORDS)
    assert find_tokenizer(str(tmp_path / "train.bin")).encode("word") == [WORDS.index("word")]
    bpe.save(str(tmp_path / "tokenizer.json"))
    found = find_tokenizer(str(tmp_path / "train.bin"))
    assert found.encode("the word") == bpe.encode("the word").ids
    assert len(found) == bpe.get_vocab_size()


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "no json", '{"version": "1.0"}'])
def test_an_invalid_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with refused(tmp_path / "tokenizer.json", "prepare.py"):
        SimpleTokenizer(tmp_path / "tokenizer.json")
    with refused(tmp_path / "tokenizer.json"):
        find_tokenizer(str(tmp_path / "train.bin"))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "."])
def test_a_missing_tokenizer_file_is_refused(tmp_path, name):
    with refused(tmp_path / name, "vocab.txt"):
        SimpleTokenizer(tmp_path / name)


def test_a_vocab_txt_that_is_no_utf8_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("é\n".encode("latin-1"))
    with refused(tmp_path / "vocab.txt"):
        SimpleTokenizer(tmp_path / "vocab.txt")


# ---------------------------------------------------------------------------- other tokenizers

README_PREPARE = """
import numpy as np
from transformers import AutoTokenizer

# Tokenize text
tokenizer = AutoTokenizer.from_pretrained("gpt2")
tokens = tokenizer.encode("<your text content>")

# Save as int32 binary
token_array = np.array(tokens, dtype=np.int32)
token_array.tofile("data/text/train.bin")

# Save validation data similarly
val_tokens = tokenizer.encode("<your validation text>")
np.array(val_tokens, dtype=np.int32).tofile("data/text/val.bin")

# Save vocabulary (optional)
with open("data/text/vocab.txt", "w") as f:
    for token, id in sorted(tokenizer.vocab.items(), key=lambda x: x[1]):
        f.write(f"{token}\\n")
"""

README_WRAPPER = """
from transformers import AutoTokenizer

class HuggingFaceTokenizerWrapper:
    def __init__(self, model_name="gpt2"):
        self.tokenizer = AutoTokenizer.from_pretrained(model_name)
        # Set special token IDs
        self.pad_token_id = self.tokenizer.pad_token_id or 0
        self.eos_token_id = self.tokenizer.eos_token_id
        self.bos_token_id = self.tokenizer.bos_token_id
        
    def encode(self, text, add_special_tokens=True, return_tensors=None):
        tokens = self.tokenizer.encode(
            text, 
            add_special_tokens=add_special_tokens,
            return_tensors=return_tensors
        )
        return tokens
        
    def decode(self, token_ids, skip_special_tokens=True):
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        
    def __len__(self):
        return len(self.tokenizer)
"""  # noqa: W291, W293


@pytest.fixture
def gpt2(tmp_path, monkeypatch, bpe):
    """The current folder holds data/text/ and, named gpt2, a small tokenizer."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("data/text").mkdir(parents=True)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, unk_token=EOS
    )
    fast.save_pretrained("gpt2")
    return fast


def test_data_prepared_as_the_readme_says_is_read_and_decoded(gpt2):
    exec(README_PREPARE, {})
    text, words = "<your text content>", find_tokenizer("data/text/train.bin")
    tokens = np.fromfile("data/text/train.bin", np.int32)
    assert words.decode(tokens) == text and len(words) == len(gpt2)
    assert words.eos_token_id == gpt2.eos_token_id
    data = StreamingTokenDataset(
        "data/text/train.bin", block_size=len(tokens) - 1, vocab_size=len(words)
    )
    x, y = data[0]
    assert words.decode([*x, y[-1]]) == text


class Rot13:
    """The least a tokenizer can be: encode and decode, no length, no special ids."""

    def encode(self, text):
        return [(ord(c) + 13) % 128 for c in text]

    def decode(self, ids):
        return "".join(chr((i - 13) % 128) for i in ids)


def sample_with(tokenizer, capsys, **config):
    """A Trainer with this tokenizer, and what it prints when it is to give a sample."""
    ids = np.arange(2000) % 100
    paths = [write_tokens(Path("data/text") / name, ids) for name in ("train.bin", "val.bin")]
    train, val = map(str, paths)
    config = tiny_config(
        train_data_path=[train], val_data_path=[val], generation_prompt="the ",
        generation_length=5, generation_temperature=0.0, log_dir=str(Path("logs").absolute()),
        **config)  # fmt: skip
    trainer = Trainer(config, tokenizer=tokenizer)
    try:
        trainer.sample()
    finally:
        trainer.log.close()
    out = capsys.readouterr()
    return trainer, out.out + out.err


def test_the_readme_tokenizer_wrapper_works_in_the_trainer(gpt2, capsys):
    names = {}
    exec(README_WRAPPER, names)
    wrapper = names["HuggingFaceTokenizerWrapper"]()
    assert wrapper.decode(wrapper.encode("the word é")) == "the word é"
    trainer, printed = sample_with(wrapper, capsys, vocab_size=len(wrapper))
    assert trainer.tokenizer is wrapper and "sample at step 0:\nthe " in printed
    assert trainer.config.eos_id == wrapper.eos_token_id == 0


def test_any_object_with_encode_and_decode_works_in_the_trainer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data/text").mkdir(parents=True)
    trainer, printed = sample_with(Rot13(), capsys, vocab_size=128)
    assert "sample at step 0:\nthe " in printed and trainer.config.eos_id == -1


def test_a_prompt_that_vocab_txt_lacks_the_bytes_for_does_not_break_a_sample(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("data/text").mkdir(parents=True)
    lines = [f"word{i}" for i in range(100)]
    words = SimpleTokenizer(write_vocab(tmp_path / "data" / "text" / "vocab.txt", lines))
    assert max(words.encode("the ")) >= 100
    assert "no sample: generation_prompt" in sample_with(words, capsys, vocab_size=100)[1]


# ------------------------------------------------------------------------------------- shards


def make_shards(folder, *lengths, dtype=np.int32, **facts):
    """Shards of ids 0, 1, 2 ... over all of them, with numbers that are not padded."""
    folder.mkdir(exist_ok=True)
    begin = 0
    for k, length in enumerate(lengths, 8):
        write_tokens(folder / f"part_{k}.bin", np.arange(begin, begin + length), dtype)
        if facts:
            counts = {"tokens": length, "bytes": 3 * length}
            (folder / f"part_{k}.json").write_text(json.dumps({**facts, **counts}))
        begin += length
    return folder


def test_shards_are_one_long_file(tmp_path):
    folder = make_shards(tmp_path / "shards", 5000, 1, 3000, 0, 7000)
    write_tokens(tmp_path / "one.bin", np.arange(15_001))
    one = open_tokens(tmp_path / "one.bin")
    for file in (open_tokens(folder), open_tokens(str(folder / "part_*.bin"))):
        assert isinstance(file, ShardedTokenFile)
        assert (file.length, file.dtype) == (one.length, one.dtype)
        assert file.sampled_hash() == one.sampled_hash()
        for again in (file, pickle.loads(pickle.dumps(file))):
            for begin in (0, 4999, 5000, 5001, 8000, 15_000, 15_001):
                for end in (begin, begin + 1, 8002, 15_001):
                    if begin <= end <= file.length:
                        assert np.array_equal(again.read(begin, end), one.read(begin, end))
    with refused("part_10.bin", "id 7000 at offset 1999"):
        file.check(7000, 4000, 9000)


def test_shards_that_do_not_belong_together_are_named(tmp_path):
    with refused("shards", "no .bin file is there"):
        open_tokens(make_shards(tmp_path / "shards"))
    with refused("none*.bin", "no .bin file is there"):
        open_tokens(tmp_path / "none*.bin")
    folder = make_shards(tmp_path / "shards", 10, 10, vocab_size=99, eos_id=3)
    assert read_facts(folder) == {"vocab_size": 99, "eos_id": 3, "tokens": 20, "bytes": 60}
    facts = {"vocab_size": 99, "eos_id": 4, "tokens": 10}
    (folder / "part_9.json").write_text(json.dumps(facts))
    assert read_facts(folder) == {"vocab_size": 99, "tokens": 20}
    with refused("part_9.bin", "eos_id is 4, but 3 in", "part_8.bin"):
        open_tokens(folder)
    for name in ("train.bin", "val.bin"):
        write_tokens(tmp_path / name, np.arange(9))
    with refused("for training and for validation", "train*.bin"):
        open_tokens(tmp_path)


def test_files_of_other_programs_are_not_read_wrongly(tmp_path):
    write_tokens(tmp_path / "a.bin", np.arange(10), np.uint16)
    (tmp_path / "meta.pkl").write_bytes(b"not a pickle")
    for path in (tmp_path / "a.bin", tmp_path):
        with refused("a.bin", "nanoGPT", "pass --data_dtype uint16 --vocab_size N"):
            open_tokens(path)
        assert open_tokens(path, "uint16").length == 10
    (tmp_path / "a.json").write_text('{"dtype": "uint16"}')
    assert open_tokens(tmp_path / "a.bin").length == 10
    write_tokens(tmp_path / "c.bin", [20240520, 1, 5])
    with refused("c.bin", "llm.c"):
        open_tokens(tmp_path / "c.bin", "int32")

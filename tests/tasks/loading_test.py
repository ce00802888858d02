import dataclasses
import itertools
import json

import grain
import numpy as np
import pytest

from attnjax.tasks import augment, digits, loading, source


@dataclasses.dataclass(frozen=True)
class Count(source.Source):
    """Example i is the number i."""

    n: int = 20

    def __len__(self):
        return self.n

    def example(self, index):
        return {"image": np.full((1, 1, 1), index, np.float32), "index": np.asarray(index)}


@dataclasses.dataclass(frozen=True)
class Noise(grain.transforms.RandomMap):
    strength: float = 1.0

    def random_map(self, element, rng):
        return element | {"noise": np.asarray(self.strength * rng.random())}


@dataclasses.dataclass(frozen=True)
class Negate(grain.transforms.Map):
    def map(self, element):
        return element | {"index": -element["index"]}


def make(n=20, **options):
    options = {"batch_size": 3, "seed": 0, "transforms": (Noise(),)} | options
    return loading.loader(Count("all", n), **options)


def indices(loader, batches):
    return [batch["index"].tolist() for batch in itertools.islice(loader, batches)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


class TestOrder:
    def test_every_epoch_is_whole_and_another_order(self):
        loader = make(drop_remainder=False, num_epochs=3)
        assert loader.batches_per_epoch == 7
        batches = indices(loader, None)
        epochs = [flat(batches[i : i + 7]) for i in (0, 7, 14)]
        assert len(batches) == 21
        assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]

    def test_without_shuffle_in_order(self):
        assert indices(make(7, shuffle=False), 3) == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]

    def test_same_again_and_another_seed(self):
        first, again = (map(loading.batch_hash, itertools.islice(make(), 15)) for _ in range(2))
        assert list(first) == list(again)
        assert indices(make(), 5) != indices(make(seed=1), 5)

    def test_transforms_are_drawn_anew_for_each_example_and_epoch(self):
        loader = make(drop_remainder=False, num_epochs=5)
        noise = np.concatenate([batch["noise"] for batch in loader])
        assert len(set(noise)) == 100

    def test_transforms_come_in_order(self):
        batch = next(iter(make(shuffle=False, transforms=(Negate(), Noise(2.0)))))
        assert batch["index"].tolist() == [0, -1, -2] and batch["noise"].max() > 1


class TestRows:
    @pytest.mark.parametrize("hosts", [2, 3, 6])
    def test_hosts_read_together_what_one_host_reads(self, hosts):
        """In its order and over the ends of epochs, and changed by transforms in the same way."""
        options = {"n": 20, "batch_size": 6}
        whole = list(itertools.islice(make(**options), 8))
        size = 6 // hosts
        parts = [
            list(itertools.islice(make(rows=range(i * size, (i + 1) * size), **options), 8))
            for i in range(hosts)
        ]
        for name in ("index", "noise"):
            for step in range(8):
                together = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(together, whole[step][name])

    def test_rows_need_not_be_neighbours(self):
        whole, part = (list(itertools.islice(make(rows=rows), 13)) for rows in (None, (0, 2)))
        for all_rows, some in zip(whole, part, strict=True):
            np.testing.assert_array_equal(some["noise"], all_rows["noise"][[0, 2]])

    def test_as_many_batches_as_one_host_has(self):
        assert make(22, batch_size=6, rows=[5]).batches_per_epoch == 3
        assert len(indices(make(22, batch_size=6, rows=[5], num_epochs=2), None)) == 6

    def test_one_hosts_position_serves_any_number_of_hosts(self):
        first = iter(make(batch_size=6))
        kept = [next(first) for _ in range(5)] and first.get_state()
        expected = next(first)["index"]
        for rows in (range(3), range(3, 6), [1], None):
            batches = iter(make(batch_size=6, rows=rows))
            batches.set_state(json.loads(json.dumps(kept)))
            wanted = expected if rows is None else expected[list(rows)]
            assert next(batches)["index"].tolist() == wanted.tolist()


class TestResume:
    @pytest.mark.parametrize("stop", [0, 1, 5, 6, 7, 13])  # 6 batches an epoch
    def test_goes_on_with_the_exact_next_batch(self, stop):
        whole = [loading.batch_hash(batch) for batch in itertools.islice(make(), stop + 8)]
        first = iter(make())
        taken = [loading.batch_hash(next(first)) for _ in range(stop)]
        kept = json.dumps(first.get_state())
        second = iter(make())
        second.set_state(json.loads(kept))
        assert second.get_state() == json.loads(kept)
        rest = [loading.batch_hash(next(second)) for _ in range(8)]
        assert taken + rest == whole

    def test_may_go_back(self):
        batches = iter(make())
        start = batches.get_state()
        first = [loading.batch_hash(next(batches)) for _ in range(4)]
        batches.set_state(start)
        assert [loading.batch_hash(next(batches)) for _ in range(4)] == first

    def test_peek_takes_nothing(self):
        batches = iter(make(num_epochs=1))
        for _ in range(6):
            seen = loading.batch_hash(batches.peek())
            assert seen == loading.batch_hash(batches.peek()) == loading.batch_hash(next(batches))
        for end in (batches.peek, batches.__next__):
            with pytest.raises(StopIteration):
                end()

    def test_the_end_is_a_position(self):
        batches = iter(make(num_epochs=2))
        assert len(list(batches)) == 12
        again = iter(make(num_epochs=2))
        again.set_state(batches.get_state())
        assert list(again) == []
        longer = iter(make(num_epochs=3))
        longer.set_state(batches.get_state())
        assert len(list(longer)) == 6

    @pytest.mark.parametrize(
        ("name", "options", "was", "now"),
        [
            ("seed", {"seed": 1}, "0", "1"),
            ("batch_size", {"batch_size": 4}, "3", "4"),
            ("source", {"n": 21}, "n=20", "n=21"),
            ("shuffle", {"shuffle": False}, "True", "False"),
            ("drop_remainder", {"drop_remainder": False}, "True", "False"),
            ("transforms", {"transforms": (Noise(2.0),)}, "strength=1.0", "strength=2.0"),
        ],
    )
    def test_other_data_is_refused_by_name(self, name, options, was, now):
        batches = iter(make(**options))
        with pytest.raises(ValueError, match=f"other data: .*{name} was .*{was}.* and is .*{now}"):
            batches.set_state(iter(make()).get_state())

    def test_other_contents_under_the_same_name_are_refused(self, monkeypatch):
        state = iter(make()).get_state()
        example = Count.example
        monkeypatch.setattr(Count, "example", lambda self, i: example(self, (i + 1) % 20))
        with pytest.raises(ValueError, match="other data: source_fingerprint was"):
            iter(make()).set_state(state)

    def test_a_position_past_the_end_is_refused(self):
        state = iter(make()).get_state() | {"next_batch": 13}
        with pytest.raises(ValueError, match=r"next_batch=13 must be in \[0, 12\]"):
            iter(make(num_epochs=2)).set_state(state)


def test_processes_give_the_same_batches_and_share_states():
    options = {"batch_size": 200, "seed": 4, "transforms": (augment.Shift(), augment.Affine())}
    alone = loading.loader(digits.digits("train"), **options)
    assert alone.batches_per_epoch == 7
    expected = [loading.batch_hash(batch) for batch in itertools.islice(alone, 10)]
    batches = iter(loading.loader(digits.digits("train"), num_workers=2, **options))
    batches.set_state({"next_batch": 5, "fingerprint": alone.fingerprint()})
    assert [loading.batch_hash(next(batches)) for _ in range(5)] == expected[5:]
    batches.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 must be in \[1, 20\]"),
        ({"batch_size": 21}, r"batch_size=21 must be in \[1, 20\]"),
        ({"batch_size": 0, "drop_remainder": False}, "batch_size=0 must be at least 1"),
        ({"rows": []}, r"rows=\[\] must ascend in \[0, 2\]"),
        ({"rows": [0, 3]}, r"rows=\[0, 3\] must ascend in \[0, 2\]"),
        ({"rows": [1, 1]}, r"rows=\[1, 1\] must ascend"),
        ({"rows": [0], "drop_remainder": False}, "rows of a batch need drop_remainder=True"),
        ({"seed": -1}, "seed=-1 must be in"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"num_epochs": 0}, "num_epochs"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_transform_must_tell_its_options():
    class Silent(grain.transforms.Map):
        def map(self, element):
            return element

    with pytest.raises(ValueError, match="must have a repr that tells its options"):
        make(transforms=(Silent(),))

"""Random numbers that belong to an image: functions of (seed, epoch, index of the image, name), of nothing else.

What happens to an image then depends neither on the batch it falls into nor on the order or the number of processes,
and a training goes on from a saved step without any state. numpy's counter-based Philox takes one key per generator;
here every row of a batch has its own, so that the few lines of SplitMix64 in array arithmetic stand in for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio, odd: SplitMix64's step


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of images `rows` (indices into the data set, int64 [B]) in an epoch.

    seed, epoch: any integers. Different names give independent numbers.
    """

    seed: int
    epoch: int
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def words(self, name: str, count: int = 1) -> np.ndarray:
        """Random 64-bit words, uint64 [B, count]; the first ones do not depend on `count`."""
        text = f"{int(self.seed)} {int(self.epoch)} {name}".encode()
        first, second = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8").astype(np.uint64)
        # Two rounds: rows are consecutive numbers, and no two (seed, epoch, name) may be shifts of each other.
        starts = mix(mix(np.asarray(self.rows).astype(np.uint64) * GOLDEN + first) ^ second)
        return split_mix(starts[:, None], count)

    def uniform(self, name: str, count: int = 1) -> np.ndarray:
        """Uniform numbers in [0, 1), float64 [B, count]: the upper 53 bits of `words`."""
        return (self.words(name, count) >> np.uint64(11)) * 2.0**-53


def split_mix(states: np.ndarray, count: int) -> np.ndarray:
    """The first `count` words of SplitMix64 from each of `states` (uint64 [..., 1]).

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    return mix(states + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's bijection of 64-bit words, in which every bit of the input moves every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))

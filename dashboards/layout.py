"""What a feature store looks like on disk: columns, fixed-size details, shared texts. Under 2 kB a feature.

    manifest.json       kind "dashboard", the record of the run, the digest of every file
    columns/NAME.npy    one number a feature (COLUMNS), memory-mapped: what the table sorts and filters by
    details.npy         one DETAIL a feature, memory-mapped: what its page shows
    tokens.npy          token rows that the examples point into, -1 after the last measured token of a row
    documents.npy       index into documents.json of every token, -1 on BOS and padding
    passages.*          what every token of the rows reads as; "" where it shares a character with the token before it
    vocabulary.*        what every entry of the vocabulary reads as
"""

from __future__ import annotations

import numpy as np

from features.examples import N_BINS, N_TOP, N_UNIFORM
from features.ranking import AFTER, BEFORE

KIND = "dashboard"
FORMAT = 1
"""Rises when the layout changes; a store of another format is refused."""

N_INTERVALS = 5
PER_INTERVAL = 3
N_LOGITS = 10
N_NEIGHBOURS = 8
LOGIT_BINS = 32
HEAT = 255
"""Heat of the largest activation of a feature; 0 is silence, and the smallest activation has heat 1."""

EXAMPLE = np.dtype([("row", "<i4"), ("position", "<i2"), ("value", "<f4"), ("heat", "u1", (BEFORE + 1 + AFTER,))])
"""One firing; row −1 where there is none. `heat` is the activation around it, in 1/255 of the feature's maximum."""

PAIR = np.dtype([("id", "<i4"), ("value", "<f4")])
"""A token or a feature and a number; id −1 where there is none."""

DETAIL = np.dtype([
    ("histogram", "<u4", (N_BINS,)),            # firings by activation, bins features.examples.BIN_EDGES
    ("intervals", "<u4", (N_INTERVALS,)),       # firings by share of the maximum, equal intervals
    ("top", EXAMPLE, (N_TOP,)),                 # strongest, one a token row
    ("strata", EXAMPLE, (N_INTERVALS, PER_INTERVAL)),  # uniform samples of each interval
    ("uniform", EXAMPLE, (N_UNIFORM,)),         # uniform sample of all firings
    ("promoted", PAIR, (N_LOGITS,)), ("suppressed", PAIR, (N_LOGITS,)),
    ("logits", "<u4", (LOGIT_BINS,)), ("logit_low", "<f4"), ("logit_high", "<f4"),  # histogram of the logit effect
    ("neighbours", PAIR, (N_NEIGHBOURS,)),      # largest cosine of the directions
])

COLUMNS = {
    "count": "<i8",       # tokens on which it fired; exact
    "maximum": "<f4",     # largest activation; 0 if it never fired
    "mean": "<f4",        # mean activation where it fired; 0 if it never did
    "variance": "<f4",    # of the activations where it fired (divided by their number)
    "skewness": "<f4",    # third standardised moment of the same; 0 where the variance is 0
    "kurtosis": "<f4",    # fourth standardised moment minus 3; 0 where the variance is 0
    "norm": "<f4",        # length of what one unit of it writes
    "nearest": "<f4",     # largest cosine with another feature's direction
    "peak_token": "<i4",  # token of the strongest firing; −1 if it never fired
    "promoted_token": "<i4",  # token whose logit its direction raises most
}
BYTES_PER_FEATURE = DETAIL.itemsize + sum(np.dtype(kind).itemsize for kind in COLUMNS.values())

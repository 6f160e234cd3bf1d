"""Sizes `(rows, inputs, outputs)` that tests and benchmarks share."""

#: Products with both operands rounded to 8 bits; the last is a layer of MiniLM.
INT8 = (
    (1, 4096, 4096),
    (16, 4096, 4096),
    (128, 2048, 2048),
    (1024, 2048, 2048),
    (1, 8192, 8192),
    (512, 384, 1536),
)
#: Products with weights of 4 bits in groups: `(rows, inputs, outputs, group)`.
INT4 = tuple((m, n, n, g) for n in (4096, 8192) for g in (32, 128) for m in (1, 4, 16))
#: Sizes at which layouts end: nothing, one, a little less and more than what fits.
EDGES = (
    (0, 8, 8),
    (1, 0, 5),
    (1, 1, 1),
    (2, 31, 63),
    (3, 32, 64),
    (4, 33, 65),
    (5, 257, 15),
    (6, 96, 16),
    (7, 64, 17),
    (13, 300, 130),
)

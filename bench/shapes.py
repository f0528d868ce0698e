"""The sizes at which the lookup and the training step are measured: rows, width, codes, and rounds of timing."""

SHAPES = [
    (32_768, 64, 256, 9),
    (32_768, 64, 1_024, 7),
    (12_800, 64, 8_192, 5),
    (16_384, 256, 1_024, 5),
    (65_536, 32, 512, 7),
    (65_536, 8, 1_024, 7),
]

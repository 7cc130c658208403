"""The tolerances of the contract. Each is used beside a wrong variant that it rejects.

Logits of the tiny models are of order one, so these are absolute.
"""

REORDERED = 2e-4
"""The same sums in another order, float32: another split, other padding, chunk against recurrent.

Changing the embeddings by their last bit moves these logits by up to 9e-5 (AHN-Mamba2, two layers).
"""

ONE_LAYER = 2e-5
"""The same in a model of one layer, where nothing amplifies the rounding."""

WRONG = 5e-3
"""What a fault of one token changes at the least: the witnesses stand above this."""

HALF = 0.15
"""bfloat16 (8 bits of mantissa) against float32, relative to the largest logit."""

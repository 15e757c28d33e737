"""Search a thousand vectors in four bits per value: ``python examples/nearest.py``."""

import numpy as np

from mlx_turboquant import VectorIndex

random = np.random.default_rng(0)
vectors = random.standard_normal((1000, 384), np.float32)
queries = vectors[:5] + 0.5 * random.standard_normal((5, 384), np.float32)

index = VectorIndex(dim=384, bits=4)
index.add(vectors)
found = index.search(queries, k=3)
for query, (ids, scores) in enumerate(zip(found.ids.tolist(), found.scores.tolist())):
    print(f"query {query}: vectors {ids}, cosines {', '.join(f'{score:.2f}' for score in scores)}")
print(f"{index.nbytes:,} bytes; in float32 they are {vectors.nbytes:,}.")

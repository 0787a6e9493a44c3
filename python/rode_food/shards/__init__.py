"""Records and their pictures in a few large files: WebDataset tars or Parquet, as `docs/shards.md` describes them.

`address` reads a part of a shard, `index` knows what stands where, `write` makes shards, `examples` asks their records questions
one at a time, `order` is the order in which an epoch reads them.
"""

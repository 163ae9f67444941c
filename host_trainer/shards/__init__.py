"""WebDataset shards: tar files whose members ``KEY.jpg``, ``KEY.cls``... make a sample together.

Format: https://github.com/webdataset/webdataset, "The WebDataset Format". Shards are read with the standard
library: the webdataset package runs a shell for an address that begins with ``pipe:``, unpickles members,
and hands whole shards to workers, so that what a worker sees depends on how many there are, and a run cannot
go on from the middle of an epoch. Here each sample's place is known, so that the order of an epoch is a pure
function of the seed and the epoch, and every process and worker takes its part of that one order.
"""

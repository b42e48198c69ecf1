"""The varlen attention kernels of a GPU as a formula, for a CPU."""

import torch

from qirl.models.attention_backends import Dense, Varlen


class DenseByBlock(Dense):
    """The formula, on images apart from text."""

    by_block = True


class DenseVarlen(Varlen):
    """What the varlen kernels of a GPU compute, sequence by sequence: given cumulative lengths and nothing else."""

    def run(self, q, k, v, n, causal):
        parts = [self._dense(False, *x, causal) for x in self._sequences(n, (q,), (k, v))]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def run_backward(self, dout, q, k, v, out, lse, n, causal):
        sequences = self._sequences(n, (dout, q), (k, v), (out, lse))
        return tuple(torch.cat(each) for each in zip(*(self._dense(True, *x, causal) for x in sequences), strict=True))

    def _sequences(self, n, queries, keys, more=()):
        lengths_q, lengths_k = n.q.diff().tolist(), n.k.diff().tolist()
        assert n.longest >= (max(lengths_q), max(lengths_k)) and n.q.dtype == n.k.dtype == torch.int32
        queries, keys, more = (
            [x[: sum(n)] for x in each] for each, n in ((queries, lengths_q), (keys, lengths_k), (more, lengths_q))
        )
        cut = (
            [x.split(lengths_q) for x in queries]
            + [x.split(lengths_k) for x in keys]
            + [x.split(lengths_q) for x in more]
        )
        return zip(*cut, strict=True)

    @staticmethod
    def _dense(backward, *tensors):
        *tensors, causal = tensors
        batch = [x.transpose(0, 1)[None] for x in tensors]
        found = (Dense().run_backward if backward else Dense().run)(*batch, causal)
        return [x[0].transpose(0, 1) for x in found]

"""The trainer's side of a model that is split over several processes: Hugging Face modules over the
parts that the engines of these processes hold.

The communication is Megatron's (arXiv 1909.08053): a layer that is cut by rows takes a whole input
and gives a part of the output, one that is cut by columns the reverse, and one sum over the group
joins them. It is written as functions of autograd over torch.distributed. The styles of
torch.distributed.tensor.parallel make DTensors out of parameters that they distribute themselves,
and transformers' own plan loads its shards: both would own copies, and here every parameter is a
view of a tensor of vLLM's, cut by vLLM (KV heads on several cards, a padded vocabulary).
"""

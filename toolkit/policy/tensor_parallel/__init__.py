"""Build the trainer's side of a model that is split over several processes: Hugging Face modules on
the parts that the engines of these processes have.

The communication is Megatron's (arXiv 1909.08053). A layer that is split by rows takes a whole
input and computes a part of the output. A layer that is split by columns takes a part of the input,
and its outputs are summed over the group. The communication is implemented as autograd functions
over torch.distributed. Two alternatives own copies of the weights:
torch.distributed.tensor.parallel creates DTensors from parameters that it distributes itself, and
transformers' own plan loads its shards. Here every parameter is a view of a vLLM tensor, which vLLM
has split (KV heads on several cards, a padded vocabulary).
"""

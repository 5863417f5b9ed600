"""Build the trainer's model if a model is split over several processes (tensor parallelism). Each
process has Hugging Face modules whose weights are the parts that its engine has.

The method is Megatron's (arXiv 1909.08053). A layer that is split by the rows of its weight takes
the whole input and computes a part of the output. A layer that is split by columns takes a part of
the input, and its outputs are summed over the group. The sums are autograd functions that call
torch.distributed.

torch.distributed.tensor.parallel and transformers also implement tensor parallelism. They cannot be
used, because they distribute or load the weights themselves. In this package every parameter is a
view of a vLLM tensor, and vLLM has decided how the tensor is split (for example, the same KV heads
on several GPUs, and a padded vocabulary).
"""

"""The runs of test_differential_keys: values of single grpo keys, and of keys that belong together.

There are legal values, limits of ranges, and values that an upstream library refuses.
"""

from __future__ import annotations

EVALUATED = "dataset.eval_path=eval.jsonl grpo.eval_strategy=steps grpo.eval_steps=1"
BY_STEP = f"{EVALUATED} grpo.save_strategy=best"

# Each line is one run: its overrides, separated by spaces. Keys without a section are grpo keys.
SCHEDULES = """
lr_scheduler_type=linear
lr_scheduler_type=cosine
lr_scheduler_type=cosine lr_scheduler_kwargs={"num_cycles":"a"}
lr_scheduler_type=cosine lr_scheduler_kwargs={"num_cycle":1}
lr_scheduler_type=cosine lr_scheduler_kwargs={"optimizer":1}
lr_scheduler_type=cosine lr_scheduler_kwargs={"num_training_steps":1}
lr_scheduler_type=cosine_with_restarts lr_scheduler_kwargs={"num_cycles":2}
lr_scheduler_type=polynomial
lr_scheduler_type=polynomial learning_rate=1e-8
lr_scheduler_type=polynomial lr_scheduler_kwargs={"lr_end":0.1}
lr_scheduler_type=constant warmup_steps=3
lr_scheduler_type=constant lr_scheduler_kwargs={"num_cycles":1}
lr_scheduler_type=constant_with_warmup
lr_scheduler_type=inverse_sqrt
lr_scheduler_type=inverse_sqrt lr_scheduler_kwargs={"timescale":0}
lr_scheduler_type=cosine_with_min_lr
lr_scheduler_type=cosine_with_min_lr lr_scheduler_kwargs={"min_lr":1e-5}
lr_scheduler_type=cosine_with_min_lr lr_scheduler_kwargs={"min_lr_rate":0.1}
lr_scheduler_type=cosine_with_min_lr lr_scheduler_kwargs={"min_lr_rate":0.1,"min_lr":1e-5}
lr_scheduler_type=cosine_warmup_with_min_lr
lr_scheduler_type=cosine_warmup_with_min_lr lr_scheduler_kwargs={"min_lr_rate":0.1}
lr_scheduler_type=warmup_stable_decay
lr_scheduler_type=warmup_stable_decay lr_scheduler_kwargs={"num_decay_steps":1}
lr_scheduler_type=warmup_stable_decay lr_scheduler_kwargs={"num_decay_steps":1,"decay_type":"x"}
lr_scheduler_type=warmup_stable_decay lr_scheduler_kwargs={"num_decay_steps":"one"}
lr_scheduler_type=linear lr_scheduler_kwargs={"last_epoch":5}
EVALUATED lr_scheduler_type=reduce_lr_on_plateau
EVALUATED lr_scheduler_type=reduce_lr_on_plateau lr_scheduler_kwargs={"mode":"maxx"}
EVALUATED lr_scheduler_type=greedy lr_scheduler_kwargs={"min_lr":1e-6}
EVALUATED lr_scheduler_type=greedy metric_for_best_model=eval_reward
lr_scheduler_type=greedy
warmup_steps=0.5
warmup_steps=5.5
warmup_steps=50
"""
OPTIMIZERS = """
adam_beta1=0
adam_beta1=0 adam_beta2=0
adam_epsilon=10
weight_decay=5
max_grad_norm=0
optim=adafactor
optim=sgd
optim=sgd optim_args=nesterov=true
optim=sgd optim_args=momentum=0.9,nesterov=true
optim=sgd optim_args=momentum=a
optim=sgd optim_args=momentum
optim=sgd optim_args=momentun=0.9
optim=adamw_torch optim_args=beta1=0.9
optim=adagrad
optim=adagrad optim_args=lr_decay=-1
optim=rmsprop optim_args=alpha=0.9
optim=adamw_torch_xla
optim=adamw_torch_npu_fused
optim=adamw_anyprecision
optim=adamw_torch_4bit
optim=ademamix
optim=paged_adamw_8bit
optim=rmsprop_bnb
optim=galore_adamw
optim=galore_adamw optim_target_modules=all-linear
optim=galore_adamw_layerwise optim_target_modules=all-linear
optim=lomo
optim=grokadamw
optim=schedule_free_adamw
optim=apollo_adamw
optim=stable_adamw
optim_target_modules=all-linear
"""
EVALUATION = """
EVALUATED
EVALUATED eval_do_concat_batches=false
EVALUATED eval_use_gather_object=true
EVALUATED eval_accumulation_steps=1
EVALUATED include_for_metrics=["inputs"]
EVALUATED batch_eval_metrics=true
EVALUATED prediction_loss_only=true
EVALUATED num_generations_eval=1
EVALUATED label_names=["x"]
EVALUATED per_device_eval_batch_size=64
EVALUATED per_device_eval_batch_size=64 dataloader_drop_last=true
EVALUATED bf16_full_eval=true
EVALUATED metric_for_best_model=x
EVALUATED eval_on_start=true
EVALUATED eval_delay=1
eval_strategy=steps
eval_on_start=true
save_strategy=best
save_strategy=best metric_for_best_model=eval_reward
BY_STEP
BY_STEP metric_for_best_model=reward
BY_STEP metric_for_best_model=eval_loss
BY_STEP metric_for_best_model=accuracy
BY_STEP metric_for_best_model=eval/reward
BY_STEP metric_for_best_model=rewards/score/mean
BY_STEP load_best_model_at_end=true
load_best_model_at_end=true save_strategy=no
save_strategy=epoch
save_steps=0.0000001
greater_is_better=true
"""
TRAINER = """
max_steps=-1 num_train_epochs=0.01
max_steps=-1 num_train_epochs=0
max_steps=-1 num_train_epochs=1 gradient_accumulation_steps=64
dataset.limit=1 steps_per_generation=2
dynamic_sampling=true
dynamic_sampling=true max_resample_times=50 curriculum=true curriculum_share=1
max_resample_times=0 dynamic_sampling=true
curriculum=true curriculum_share=1.5
tf32=true
tf32=false
torch_compile_backend=x
torch_compile_backend=eager
torch_compile_mode=x
use_liger_kernel=true
neftune_noise_alpha=5
neftune_noise_alpha=0
include_num_input_tokens_seen=all
include_num_input_tokens_seen=true
report_to=wandbb
report_to=wandb
report_to=null
report_to=[]
report_to=["none"]
report_to=["tensorboard","wandb"]
report_to=all
run_name=x
trackio_space_id=a/b
full_determinism=true
accelerator_config={"split_batch":true}
accelerator_config={"split_batches":true}
accelerator_config={"split_batches":"x"}
accelerator_config={"dispatch_batches":true}
accelerator_config={"even_batches":false}
accelerator_config={"non_blocking":true}
accelerator_config={"gradient_accumulation_kwargs":{"num_steps":3}}
accelerator_config={"gradient_accumulation_kwargs":{"x":3}}
accelerator_config={"use_configured_state":true}
dataloader_num_workers=1 dataloader_persistent_workers=true
dataloader_num_workers=1 dataloader_prefetch_factor=2
dataloader_num_workers=1 dataloader_multiprocessing_context=forkserver
dataloader_multiprocessing_context=spawn
dataloader_persistent_workers=true
dataloader_prefetch_factor=2
dataloader_drop_last=true
dataloader_in_order=false
remove_unused_columns=true
train_sampling_strategy=group_by_length
ddp_backend=nccl
ddp_backend=mpi
ddp_static_graph=true
ddp_timeout=1
debug=underflow
debug=underflow_overflow
debug=["underflow_overflow"]
debug=tpu_metrics_debug
skip_memory_metrics=false
router_aux_loss_coef=0.1
router_aux_loss_coef=0
cast_lm_head_to_fp32=true
disable_dropout=true
pad_to_multiple_of=64
steps_per_generation=2 num_iterations=2
label_smoothing_factor=0.5
logging_strategy=epoch
log_level=debug
seed=4294967295
"""
GRPO = """
cache_implementation=x
cache_implementation=static
cache_implementation=quantized
cache_implementation=offloaded
use_transformers_continuous_batching=true transformers_continuous_batching_config={"x":1}
beta=0.1
epsilon=0
delta=0
loss_type=vespo vespo_k_pos=0 vespo_k_neg=0 vespo_lambda_pos=0 vespo_lambda_neg=0
loss_type=luspo importance_sampling_level=token
loss_type=sapo sapo_temperature_neg=100
loss_type=cispo
reward_weights=[1.0]
reward_weights=[1.0,2.0]
multi_objective_aggregation=normalize_then_sum
scale_rewards=batch
mask_truncated_completions=true
top_entropy_quantile=0
entropy_coef=-0.1
use_adaptive_entropy=true
use_adaptive_entropy=true entropy_coef_min=2 entropy_coef_max=1
vllm_importance_sampling_clip_max=null
vllm_importance_sampling_clip_min=5
off_policy_mask_threshold=0.1
log_completions=true
top_k=1000
min_p=1
repetition_penalty=100
"""


def runs() -> list[str]:
    """Every line, with EVALUATED and BY_STEP replaced by their overrides."""
    lines = "".join((SCHEDULES, OPTIMIZERS, EVALUATION, TRAINER, GRPO)).split("\n")
    return [
        line.replace("EVALUATED", EVALUATED).replace("BY_STEP", BY_STEP) for line in lines if line
    ]


def overrides(line: str) -> list[str]:
    """The overrides of a line, each with the section of its key."""
    words = line.split(" ")
    return [word if "." in word.partition("=")[0] else f"grpo.{word}" for word in words]

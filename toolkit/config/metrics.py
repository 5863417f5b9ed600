"""The names and explanations of the values in metrics.jsonl and timings.jsonl. The warnings and the
report of a run use these names. A test trains a model and compares the names with this table.
"""

from __future__ import annotations

from toolkit.config.message_text import wrap_text

METRICS = {
    "step": "The number of optimizer steps at this row.",
    "reward": "The mean weighted reward of the completions. null: no completion was scored.",
    "reward_std": "The standard deviation of the rewards. Near 0 there is little to learn from.",
    "rewards/NAME/mean": "The mean of one reward function, before its weight.",
    "rewards/NAME/std": "The standard deviation of one reward function, before its weight.",
    "rewards/NAME/failed": "The share of samples on which a reward function failed or returned "
    "an unusable value. bad_rewards.jsonl in the run folder has these samples.",
    "steps_without_signal": "The number of steps in a row, up to this one, in which the model "
    "could learn nothing from the rewards: no completion was scored, or all completions of "
    "each prompt had the same reward. GRPO learns from the differences within a group. Likely "
    "causes: the task is too hard or too easy for the model; the reward cannot read the "
    "answers (wrong format, or cut at the limit); the completions are too similar. Read "
    "completions.jsonl in the run folder. Then change the data or the reward, raise "
    "grpo.num_generations, grpo.temperature or grpo.max_completion_length, or set "
    "grpo.dynamic_sampling.",
    "frac_reward_zero_std": "The share of groups (the completions of one prompt) in which all "
    "rewards are equal. Such groups do not change the weights. At 1, steps_without_signal "
    "counts.",
    "skipped": "1 if the step was dropped because the loss or the gradient was not finite. The "
    "run ends after runtime.max_bad_steps such steps in a row. Lower grpo.learning_rate, or "
    "set grpo.max_grad_norm.",
    "loss": "The loss. It is near 0 by construction, because the advantages of a group have "
    "the mean 0. Watch the reward instead.",
    "kl": "The KL divergence from the reference model in nats per token. It is logged if "
    "grpo.beta is not 0.",
    "entropy": "The mean entropy of the policy in nats per token. Near 0 the model does not "
    "explore.",
    "completion_length": "The mean length of the completions in tokens.",
    "completions/min_length": "The length of the shortest completion in tokens.",
    "completions/max_length": "The length of the longest completion in tokens.",
    "completions/clipped_ratio": "The share of completions that were cut at "
    "grpo.max_completion_length. If it is high, the reward may not see the answers: raise the "
    "limit, or ask for shorter answers.",
    "completions/mean_terminated_length": "The mean length in tokens of completions that were "
    "not cut.",
    "completions/min_terminated_length": "The length in tokens of the shortest completion that "
    "was not cut.",
    "completions/max_terminated_length": "The length in tokens of the longest completion that "
    "was not cut.",
    "grad_norm": "The norm of the gradient before clipping (grpo.max_grad_norm).",
    "learning_rate": "The learning rate of this step, from the schedule.",
    "epoch": "The number of passes over the data so far.",
    "num_tokens": "The number of tokens of prompts and completions so far.",
    "aux_loss": "The auxiliary loss of the router of a mixture of experts.",
    "policy_loss": "The loss without the terms of KL and entropy.",
    "entropy_coef": "The coefficient of the entropy bonus.",
    "cispo_clip_ratio": "The share of tokens whose weight was clipped (loss_type: cispo).",
    "vespo/phi_seq_mean": "The mean weight of a sequence (loss_type: vespo).",
    "clip_ratio/low_mean": "The share of tokens whose ratio was clipped at 1 - grpo.epsilon. "
    "With one step per rollout it is 0.",
    "clip_ratio/low_min": "The smallest share of any process, as clip_ratio/low_mean.",
    "clip_ratio/high_mean": "The share of tokens whose ratio was clipped at 1 + grpo.epsilon_high.",
    "clip_ratio/high_max": "The largest share of any process, as clip_ratio/high_mean.",
    "clip_ratio/region_mean": "The share of tokens whose ratio was clipped at either side.",
    "sampling/logp_gap_mean": "The mean difference between the log-probabilities of the engine "
    "and of the trainer for the sampled tokens, in nats per token. It is the figure to watch: "
    "if the rollouts came from another model than the one that is trained, it would grow. "
    "Rounding in bfloat16 causes a few hundredths; in float32 it is below 1e-5. If it grows, "
    "stop the run and report it.",
    "sampling/logp_gap_max": "The largest of the differences of which sampling/logp_gap_mean "
    "is the mean.",
    "sampling/sampling_logp_difference/mean": "TRL's name of sampling/logp_gap_mean.",
    "sampling/sampling_logp_difference/max": "TRL's name of sampling/logp_gap_max.",
    "sampling/importance_sampling_ratio/min": "The smallest weight that corrects for the "
    "difference between engine and trainer.",
    "sampling/importance_sampling_ratio/mean": "The mean weight that corrects for the "
    "difference between engine and trainer. Far below 1, little of the gradient is left.",
    "sampling/importance_sampling_ratio/max": "The largest weight that corrects for the "
    "difference between engine and trainer.",
    "packing/skipped_rows": "The share of completions that training left out, because their "
    "advantage is 0 and no other term of the loss needs them. The gradient is the same.",
    "dynamic_sampling/no_spread_before": "The share of groups whose rewards are all equal, as "
    "first drawn.",
    "dynamic_sampling/no_spread_after": "The share of groups whose rewards are still all equal "
    "after dynamic sampling. They are trained on and teach nothing. If it stays high, the task "
    "is too hard or too easy, or grpo.max_resample_times is too low.",
    "dynamic_sampling/rounds": "The number of rounds in which groups were drawn again.",
    "dynamic_sampling/sampled_completions": "The number of completions drawn, with discarded ones.",
    "dynamic_sampling/discarded_completions": "The number of completions that were drawn and "
    "not trained on.",
    "dynamic_sampling/discarded_tokens": "The number of tokens of discarded completions.",
    "curriculum/measured_share": "The share of the dataset that was drawn so far.",
    "curriculum/repeated_share": "The share of the batch's prompts that were drawn before.",
    "curriculum/expected_spread": "The mean standard deviation of the rewards, in earlier "
    "draws, of prompts that were chosen again. The curriculum prefers large values.",
    "curriculum/mean_spread": "The same mean over all prompts drawn so far.",
    "tools/call_frequency": "The mean number of tool calls per completion.",
    "tools/failure_frequency": "The share of tool calls that failed.",
}
"""metrics.jsonl: name -> what it means and what to do. A value of an evaluation has the prefix
``eval/``.
"""
TIMINGS = {
    "time_s": "The seconds since training began (in this process).",
    "step_s": "The seconds of this step.",
    "rollout_s": "The seconds in which completions were drawn.",
    "publish_s": "The seconds in which the adapter was given to the engine.",
    "reward_s": "The seconds in which the rewards were computed.",
    "train_s": "The seconds of the forward and backward passes, the optimizer and all else.",
    "tokens_per_s": "The tokens of completions per second of the step, with discarded ones.",
    "peak_memory_bytes": "The peak of the GPU's memory so far; on the CPU, of the process's "
    "memory.",
}
"""timings.jsonl: name -> what it means."""
_PLACEHOLDER = "NAME"


def explain_metric(topic: str) -> str | None:
    """Return the explanation of the metric ``topic`` as text; None if there is no such metric.
    ``topic`` is the full name of a metric or the last part of its name.
    """
    metric = topic.removeprefix("eval/").removeprefix("timing/")
    matches = [name for name in names() if _matches(name, metric)]
    if not matches and "/" not in metric:
        matches = [name for name in names() if name.rpartition("/")[2] == metric]
    return "\n\n".join(_explanation(name) for name in matches) or None


def names() -> list[str]:
    """Return the names of all metrics. ``NAME`` in them stands for the name of a
    reward function.
    """
    return [*METRICS, *TIMINGS]


def explain_all() -> str:
    """Return the explanations of all metrics as text."""
    return "\n\n".join(map(_explanation, names()))


def _matches(name: str, metric: str) -> bool:
    before, placeholder, after = name.partition(_PLACEHOLDER)
    if not placeholder:
        return name == metric
    reward_name = metric.removeprefix(before).removesuffix(after)
    return metric == f"{before}{reward_name}{after}" and bool(reward_name)


def _explanation(name: str) -> str:
    file = "metrics.jsonl" if name in METRICS else "timings.jsonl"
    text = METRICS.get(name) or TIMINGS[name]
    return "\n".join([f"{name} (a value in {file} of a run folder)", *wrap_text(text)])

"""TRL's side of bench/speed.py's row `ppo`, run by the python of an environment that has TRL 1.11.

Policy, reference, reward model and critic come from the files that ours loads. Its optimiser steps are as many as ours
where a rollout is one forward pass (shapes tiny and smollm2); where it is several, TRL adds them all up into one step.
"""

import json
import sys

import torch
from datasets import Dataset
from sides import CUDA, Job, Turns, clock
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental import ppo


def arguments(job: Job) -> ppo.PPOConfig:
    rollout, minibatches, micro = job.shape.ppo
    return ppo.PPOConfig(
        output_dir=f"{job.folder}/trl",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rollout // micro,
        local_rollout_forward_batch_size=micro,
        num_mini_batches=minibatches,
        num_ppo_epochs=1,
        total_episodes=rollout * 10**6,
        response_length=job.shape.new,
        temperature=1.0,
        stop_token="eos",
        missing_eos_penalty=1.0,
        learning_rate=1e-9,  # the work is the same, and lengths stay what they are
        bf16=CUDA,
        use_cpu=not CUDA,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
    )


def main(job: Job) -> None:
    turn, trainer_module, split, lengths = Turns(job), sys.modules[ppo.PPOTrainer.__module__], {}, []
    sample, truncate = trainer_module.batch_generation, trainer_module.truncate_response

    def timed_sample(*args):
        start = clock()
        out = sample(*args)
        split["generate"] = clock() - start
        return out

    def counted_truncate(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        out = truncate(stop, pad, responses)  # (b, T)
        lengths.extend((out != pad).sum(1).tolist())
        return out

    class Pause(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            turn(lengths=lengths, split=split)
            lengths.clear()

    trainer_module.batch_generation, trainer_module.truncate_response = timed_sample, counted_truncate
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{job.folder}/model/tokenizer.json", eos_token="<end>", pad_token="<pad>", padding_side="left"
    )
    critic, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(f"{job.folder}/reward", num_labels=1, dtype=torch.float32)
        for _ in range(2)
    )
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(f"{job.folder}/model", dtype=torch.float32) for _ in range(2)
    )
    prompts = Dataset.from_dict({"input_ids": job.texts()[0]})
    trainer = ppo.PPOTrainer(
        args=arguments(job),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=critic,
        train_dataset=prompts,
        eval_dataset=prompts,  # made into a loader, never read
        callbacks=[Pause()],
    )
    turn()
    trainer.train()


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[2])))

"""Replaces vLLM in tests: the names and arguments that evaluation/vllm_engine.py uses, implemented by transformers.

It can't show how vLLM itself treats them.
"""

import types

import torch
from transformers import AutoModelForCausalLM


class SamplingParams:
    def __init__(self, *, temperature, top_p, top_k, max_tokens, seed, stop_token_ids, detokenize):
        assert (top_p, top_k, detokenize) == (1.0, -1, False)
        self.temperature, self.max_tokens, self.stop_token_ids = temperature, max_tokens, stop_token_ids
        self.generator = torch.Generator().manual_seed(seed)


class LLM:
    def __init__(self, model, *, dtype, max_model_len, trust_remote_code, gpu_memory_utilization=0.9):
        print(f"vLLM's stand-in: gpu_memory_utilization={gpu_memory_utilization} max_model_len={max_model_len}")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        pairs = zip(prompts, sampling_params, strict=True)
        return [self.output(prompt["prompt_token_ids"], params) for prompt, params in pairs]

    @torch.no_grad()
    def output(self, prompt: list[int], params: SamplingParams):
        new = []
        while len(new) < params.max_tokens and not set(new[-1:]) & set(params.stop_token_ids):
            logits = self.model(torch.tensor([prompt + new])).logits[0, -1]
            if params.temperature == 0:
                new.append(int(logits.argmax()))
            else:
                softmax = (logits / params.temperature).softmax(-1)
                new.append(int(torch.multinomial(softmax, 1, generator=params.generator)))
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=new)])

"""vLLM's side of bench/against_vllm.py, run by the interpreter of vLLM's environment: python bench/vllm_worker.py MODEL
DTYPE LENGTH [eager]. Reads one JSON line a job, {"prompts": token ids, "new": tokens of each answer}, and writes a line
with the seconds it took and the number of tokens drawn; "ready" comes first. No seeds: with them vLLM 0.32 fails on a
CPU where a prompt is read in chunks."""

import json
import os
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, dtype, length, *eager = sys.argv[1:]
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever else it prints goes to the log
    engine = LLM(
        model,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=bool(eager),
        enable_prefix_caching=False,
        max_model_len=int(length),
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    )
    os.write(answers, b'"ready"\n')
    for line in sys.stdin:
        job = json.loads(line)
        how = SamplingParams(max_tokens=job["new"], ignore_eos=True, detokenize=False, logprobs=0)
        requests = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
        began = time.perf_counter()
        found = engine.generate(requests, how, use_tqdm=False)
        seconds = time.perf_counter() - began
        num_sampled = sum(len(one.outputs[0].token_ids) for one in found)
        os.write(answers, json.dumps({"seconds": seconds, "num_tokens": num_sampled}).encode() + b"\n")

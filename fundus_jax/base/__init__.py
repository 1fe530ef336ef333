"""The `base` stage: a small Qwen2.5-VL made from nothing, standing in for the real one's pre-training on
machines without it.

`policy` builds its configuration, tokenizer and first weights; `warmup` teaches its vision tower under a
findings head that is then thrown away. Reports say that this stage exists; configurations of the real models
start from real weights and skip it.
"""

"""The frozen base model as it is computed; the engine and training stand on it.

folder.py             find and identify the model          model.py             load it frozen
folder_check.py       refuse what cannot be served       transformers_source.py  what transformers can compute
prompts.py            chats and texts to token ids         attention.py         the contract of a pass's attention
tokenizer.py          token ids without transformers       chat_template.py     templates without transformers
weights.py            one copy for all processes (CPU)     cuda_weights.py      the same on a GPU
panels.py, int8.py    linear layers in faster layouts      fused.py, fused_attention.py   faster modules
kernel_choice.py      ours or torch's, by measured speed   cpu_kernels/         the C++ kernels
weights_check.py      hash the model's files again
replacement.py        put faster modules in place          memory.py            freeze the collector, trim the heap
lent_tensor.py        a GPU tensor as plain data           model_errors.py      models and kernels that cannot run
literal_tokenizer.py  special tokens in texts are text     token_bytes.py       the bytes of single tokens
"""

"""What the side-by-side scripts share: the transformers model with the very weights of one of ours."""

from __future__ import annotations

import torch
import transformers

from lilliput.models.decoder import Decoder
from lilliput.models.families import from_canonical, hf_from_spec


def transformers_twin(model: Decoder) -> transformers.PreTrainedModel:
    """transformers' model of the same shape, fp32, holding copies of the weights."""
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(**hf_from_spec(model.spec))
    twin = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = twin.load_state_dict(dict(from_canonical(model.spec, model.get_parameter)), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"the twin lacks {missing} and does not know {unexpected}")
    twin.tie_weights()
    return twin


def greedy(twin: transformers.PreTrainedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """transformers' greedy generate: exactly `new` tokens for each prompt; prompts of one length are one batch."""
    tokens_BT = torch.tensor(prompts)
    how = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        return twin.generate(tokens_BT, attention_mask=torch.ones_like(tokens_BT), generation_config=how)[:, tokens_BT.shape[1] :].tolist()
